# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a SATS step costs beside what it must: a fine-tuning step and the old model's forward pass."""

from collections.abc import Callable
from dataclasses import replace

import torch
from prettytable import PrettyTable, TableStyle
from torch import Tensor

from benchmarks.measure import PRECISIONS, Ratio, Work, device, median_seconds, peak_bytes
from benchmarks.models import Stage, stage
from mmseg_sats.models.pixel_losses.shared import shared_losses
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors.old_model import run_segmentor

NUM_OLD, NUM_NEW = 20, 1
"""Channels of the last stage of 15-1 on VOC."""


def measure() -> list[Ratio]:
    """Time and peak memory, in each precision that the device has."""
    names = ['fp32', 'bf16'] + ['fp16'] * (device().type != 'cpu')
    return [ratio for name in names for ratio in _ratios(name)]


def _ratios(precision: str) -> list[Ratio]:
    dtype, size = PRECISIONS[precision], crop_size(precision)
    sats, tuned = (
        stage(method, NUM_OLD, NUM_NEW, dtype=dtype, crop_size=size) for method in ('sats', 'finetune')
    )
    print(f'{precision}, crop {size}', flush=True)
    seconds = median_seconds({'SATS': sats.step, 'FT': tuned.step, 'old model': sats.old_forward})
    parts = median_seconds(parts_of(sats))
    parts['student, forward and backward'] = (
        seconds['FT'] - parts['optimizer'] - parts['(cross-entropy alone)']
    )
    print_profile(parts, seconds, precision)
    sats_bytes, tuned_bytes = peak_bytes(sats.step), peak_bytes(tuned.step)
    weights = sum(p.numel() * p.element_size() for p in sats.model.old_model.model.parameters())
    floor = seconds['FT'] + seconds['old model']
    return [
        Ratio(
            f'time, {precision}',
            seconds['SATS'] / floor,
            1.10,
            detail=f'{seconds["SATS"]:.2f} s over {seconds["FT"]:.2f} + {seconds["old model"]:.2f} s',
        ),
        Ratio(
            f'peak memory, {precision}',
            (sats_bytes + weights) / (tuned_bytes + weights),
            1.15,
            detail=f'{sats_bytes / 2**20:.0f} over {tuned_bytes / 2**20:.0f} MiB,'
            f' both and {weights / 2**20:.0f} MiB of the old model',
        ),
    ]


def crop_size(precision: str) -> int:
    """512; less where a CPU without instructions for bfloat16 would take minutes for a step."""
    slow = precision == 'bf16' and device().type == 'cpu'
    return 128 if slow and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else 512


def parts_of(sats: Stage) -> dict[str, Work]:
    """The parts of a SATS step but for the student, each with its backward pass where it has one."""
    model = sats.model
    labels = sats.labels
    labelers = {'stage': model.pseudo_labeler}
    with sats.autocast(), torch.no_grad():
        student, teacher = run_segmentor(model, sats.inputs, True)[0], model.old_model(sats.inputs, with_attention=True)
        completed, _ = complete_labels(labels, sats.samples, labelers, student, teacher)
    student = leaves(student)

    def backward(loss: Callable[[], Tensor]) -> Work:
        def work() -> None:
            with sats.autocast():
                value = loss()
            value.backward()

        return work

    def pixels(parts: dict) -> Tensor:
        losses = shared_losses(model.decode_head, parts, student, teacher, completed)
        return sum(value for name, value in losses.items() if 'loss' in name)

    def pseudo_labels() -> None:
        with sats.autocast():
            complete_labels(labels, sats.samples, labelers, student, teacher)

    distillation = {'output': model.distillation['output']}
    return {
        'old model': sats.old_forward,
        'pseudo-labels': pseudo_labels,
        'CRP, forward and backward': backward(
            lambda: model.distillation['attention'](student, teacher, completed)
        ),
        'cross-entropy and distillation, forward and backward': backward(lambda: pixels(distillation)),
        '(cross-entropy alone)': backward(lambda: pixels({})),
        'optimizer': sats.optimizer.step,
    }


def leaves(output: SegmentorOutput) -> SegmentorOutput:
    """The same output at the start of a graph of its own."""
    maps = tuple(
        replace(own, query=own.query.detach().requires_grad_(), key=own.key.detach().requires_grad_())
        for own in output.attentions
    )
    logits = output.logits.detach().requires_grad_()
    return SegmentorOutput(logits, output.features, maps, output.align_corners)


def print_profile(parts: dict[str, float], seconds: dict[str, float], title: str) -> None:
    """Prints milliseconds of each part, and the whole steps they make."""
    table = PrettyTable([title, 'ms'])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'l'
    table.align['ms'] = 'r'
    for name, value in (*parts.items(), *((f'whole: {name}', value) for name, value in seconds.items())):
        table.add_row([name, f'{1000 * value:.0f}'])
    print(table, flush=True)
