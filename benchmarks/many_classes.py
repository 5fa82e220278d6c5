# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What classes cost: a SATS step with 21 and 151 of them, and its pixel-wise losses with 1000 too."""

import torch
import torch.nn.functional as F
from mmseg.models import SegformerHead
from torch import Tensor

from benchmarks.measure import Ratio, Work, device, median_seconds, peak_bytes
from benchmarks.models import label_maps, samples_of, stage
from mmseg_sats.models.losses import UnbiasedDistillationLoss
from mmseg_sats.models.pixel_losses.shared import shared_losses
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.pseudo_labels.entropy import EntropyPseudoLabeler
from mmseg_sats.models.segmentor_output import SegmentorOutput

SIZE, BATCH = 512, 2
NEW = 5
CLASSES = (21, 151, 1000)


def measure() -> list[Ratio]:
    """Whole steps, then the pixel-wise losses alone beside those of full-size logits."""
    steps = {str(count): stage('sats', count - NEW, NEW).step for count in CLASSES[:2]}
    seconds = median_seconds(steps)
    ratios = [
        Ratio(
            'SATS step, 151 over 21 classes',
            seconds['151'] / seconds['21'],
            1.4,
            detail=f'{seconds["151"]:.2f} over {seconds["21"]:.2f} s',
        )
    ]
    del steps
    for count in CLASSES:
        ratios += _losses(count)
    return ratios


def _losses(count: int) -> list[Ratio]:
    """Pseudo-labels, cross-entropy and distillation, with their backward pass."""
    works = {'in pieces': in_pieces(count), 'at full size': at_full_size(count)}
    # A thousand classes at full size are gigabytes and half a minute: memory once, no time.
    bytes_of = {name: peak_bytes(work) for name, work in works.items()}
    entries = BATCH * SIZE * SIZE * count * 4
    ratios = [
        Ratio(
            f'memory of the losses, {count} classes, over one tensor of all pixels and classes',
            bytes_of['in pieces'] / entries,
            2.0,
            detail=f'{bytes_of["in pieces"] / 2**20:.0f} over {entries / 2**20:.0f} MiB,'
            f' {bytes_of["at full size"] / 2**20:.0f} MiB at full size',
        )
    ]
    if count < CLASSES[-1]:
        seconds = median_seconds(works)
        ratios.append(
            Ratio(
                f'time of the losses, {count} classes, over those at full size',
                seconds['in pieces'] / seconds['at full size'],
                1.0,
                detail=f'{seconds["in pieces"]:.2f} over {seconds["at full size"]:.2f} s',
            )
        )
    return ratios


def _outputs(count: int) -> tuple[SegmentorOutput, SegmentorOutput, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, count, SIZE // 4, SIZE // 4)
    logits = 3 * torch.randn(shape, generator=generator).to(device())
    old = logits[:, : count - NEW].clone()
    labels = label_maps(BATCH, SIZE, range(count - NEW, count))
    return SegmentorOutput(logits.requires_grad_(), ()), SegmentorOutput(old, ()), labels


def in_pieces(count: int) -> Work:
    """As a stage computes them."""
    student, teacher, labels = _outputs(count)
    head = SegformerHead(
        in_channels=[4], in_index=[0], channels=4, num_classes=count, norm_cfg=dict(type='BN')
    )
    parts = {'output': UnbiasedDistillationLoss(20.0)}
    labelers = {'stage': EntropyPseudoLabeler(threshold=0.5)}

    def work() -> None:
        completed, _ = complete_labels(labels, samples_of(labels), labelers, student, teacher)
        losses = shared_losses(head, parts, student, teacher, completed)
        (losses['decode.loss_ce'] + losses['loss_output']).backward()

    return work


def at_full_size(count: int) -> Work:
    """As one would write them: logits resized once, the rest from torch's functions."""
    student, teacher, labels = _outputs(count)
    labeler = EntropyPseudoLabeler(threshold=0.5)

    def work() -> None:
        x, old = (
            F.interpolate(output.logits, labels.shape[1:], mode='bilinear')
            for output in (student, teacher)
        )
        completed = labeler(labels, old)
        cross_entropy = F.cross_entropy(x, completed, ignore_index=255, reduction='none').mean()
        (cross_entropy + 20 * unbiased_distillation_at_full_size(x, old)).backward()

    return work


def unbiased_distillation_at_full_size(student: Tensor, teacher: Tensor) -> Tensor:
    """MiB's distillation from its formula, one line after the other."""
    num_old = teacher.shape[1]
    q, log_p = teacher.softmax(1), student.log_softmax(1)
    unseen = torch.cat([log_p[:, :1], log_p[:, num_old:]], 1).logsumexp(1)
    return -(q[:, 0] * unseen + (q[:, 1:] * log_p[:, 1:num_old]).sum(1)).mean() / num_old
