# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Pooled attention beside the dense map, and the attention loss beside a loop over classes and heads."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from prettytable import PrettyTable, TableStyle
from torch import Tensor

from benchmarks.measure import PRECISIONS, Ratio, Work, device, median_seconds, peak_bytes
from mmseg_sats.functional.attention import attention_map as attention_module
from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.attention.class_regions import find_regions
from mmseg_sats.models.losses import crp_loss

BATCH, CLASSES, DIM = 4, 4, 64
HEADS = (1, 2, 5, 8)
"""MiT-B2's; its keys lie 32 pixels apart at every stage."""
STRIDES = (4, 8, 16, 32)
CROPS = (512, 1024)
THROUGHPUT_BATCH = 24


def measure() -> list[Ratio]:
    """Each of MiT-B2's shapes by itself and together, then how time and memory grow, then the loop."""
    return [*_against_dense(), *_growth(), *_against_loop(), *_fused_against_chunks()]


def attention(crop: int, block: int, batch: int = BATCH, seed: int = 0) -> AttentionMap:
    """Queries and keys of MiT-B2's stage for a crop, random, laid out as a linear layer gives them."""
    generator = torch.Generator().manual_seed(seed)
    side, keys = crop // STRIDES[block], crop // 32

    def tensor(length: int) -> Tensor:
        shape = (batch, length, HEADS[block], DIM)
        return torch.randn(shape, generator=generator).to(device()).transpose(1, 2).requires_grad_()

    return AttentionMap(tensor(side**2), tensor(keys**2), DIM**-0.5, (side, side), (keys, keys))


def labels_on(side: int, share: float = 1 / 3, batch: int = BATCH) -> Tensor:
    """(B, side, side): bands of four classes on a share of the rows, the rest background."""
    labels = torch.zeros(batch, side, side, dtype=torch.long, device=device())
    rows = max(1, round(side * share))
    for index, label in enumerate(labels):
        top = (side - rows) * (index + 1) // (batch + 1)
        for number, piece in enumerate(label[top : top + rows].chunk(CLASSES, dim=1)):
            piece.fill_(number + 1)
    return labels


def pooled(maps: AttentionMap, labels: Tensor) -> Work:
    """``.pool``, forward and backward."""

    def work() -> None:
        means, _, _ = maps.pool(labels)
        torch.autograd.grad(means.square().sum(), (maps.query, maps.key))

    return work


def dense(maps: AttentionMap, labels: Tensor) -> Work:
    """The same means from the whole map."""

    def work() -> None:
        regions = find_regions(labels)
        slots = torch.arange(regions.width, device=labels.device)
        members = (regions.slots.unsqueeze(1) == slots.unsqueeze(1)).float()
        means = (members / members.sum(2, keepdim=True)).unsqueeze(1) @ maps.dense()
        torch.autograd.grad(means.square().sum(), (maps.query, maps.key))

    return work


def _against_dense() -> list[Ratio]:
    ratios = []
    table = PrettyTable(['crop', 'stage', 'pool ms', 'dense ms', 'time', 'pool MiB', 'dense MiB', 'memory'])
    table.set_style(TableStyle.MARKDOWN)
    for crop in CROPS:
        times, peaks = [], []
        for block in range(4):
            maps = attention(crop, block)
            labels = labels_on(maps.query_hw[0])
            works = {'pool': pooled(maps, labels), 'dense': dense(maps, labels)}
            seconds = median_seconds(works)
            extra = {name: peak_bytes(work) for name, work in works.items()}
            times.append(seconds)
            peaks.append(extra)
            table.add_row(
                [crop, block + 1]
                + [f'{1000 * seconds[name]:.1f}' for name in works]
                + [f'{seconds["pool"] / seconds["dense"]:.2f}']
                + [f'{extra[name] / 2**20:.1f}' for name in works]
                + [f'{extra["pool"] / max(1, extra["dense"]):.2f}']
            )
        for what, unit, values, limit in (
            ('time', 's', times, 0.40),
            ('extra memory', 'bytes', peaks, 0.20),
        ):
            own, other = (sum(value[name] for value in values) for name in ('pool', 'dense'))
            ratios.append(
                Ratio(
                    f'pool over dense, {what}, crop {crop}',
                    own / other,
                    limit,
                    detail=f'{own:.3g} over {other:.3g} {unit}, the four stages together',
                )
            )
    print(table, flush=True)
    return ratios


def _growth() -> list[Ratio]:
    maps = attention(512, 0)
    side = maps.query_hw[0]
    works = {str(share): pooled(maps, labels_on(side, share)) for share in (0.25, 1.0)}
    seconds = median_seconds(works)
    small, large = (attention(crop, 0) for crop in CROPS)
    extra = [
        peak_bytes(pooled(own, labels_on(own.query_hw[0]))) - _gradient_bytes(own)
        for own in (small, large)
    ]
    return [
        Ratio(
            'time, all positions foreground over a quarter of them',
            seconds['1.0'] / seconds['0.25'],
            4.4,
            detail=f'{1000 * seconds["1.0"]:.0f} over {1000 * seconds["0.25"]:.0f} ms; linear is 4 or less',
        ),
        Ratio(
            'extra memory beside the gradients, crop 1024 over 512',
            max(extra[1], 1) / max(extra[0], 1),
            2.0,
            detail=f'{extra[1] / 2**20:.1f} over {extra[0] / 2**20:.1f} MiB; the maps are 16 times as large',
        ),
    ]


def _gradient_bytes(maps: AttentionMap) -> int:
    return sum(own.numel() * own.element_size() for own in (maps.query, maps.key))


def _against_loop() -> list[Ratio]:
    """The whole loss of four stages."""
    blocks = [[attention(CROPS[0], block, seed=seed) for block in range(4)] for seed in (0, 1)]
    labels = labels_on(CROPS[0])
    student = blocks[0]
    inputs = [tensor for own in student for tensor in (own.query, own.key)]

    def work(loss: Callable[[list[AttentionMap], list[AttentionMap], Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(loss(student, blocks[1], labels), inputs)

    seconds = median_seconds({'pooled': work(crp_loss), 'loop': work(loop_loss)})
    return [
        Ratio(
            'attention loss, speed over a loop per image, class and head',
            seconds['loop'] / seconds['pooled'],
            10.0,
            more_is_better=True,
            detail=f'{seconds["loop"]:.2f} over {seconds["pooled"]:.3f} s',
        )
    ]


def _fused_against_chunks() -> list[Ratio]:
    """The whole loss by the GPU's own kernels and by chunks; none without a GPU."""
    if device().type == 'cpu':
        return []
    ratios = []
    for batch in (BATCH, THROUGHPUT_BATCH):
        for precision, dtype in PRECISIONS.items():
            student, teacher = (
                [_cast(attention(CROPS[0], block, batch, seed), dtype) for block in range(4)]
                for seed in (0, 1)
            )
            labels = labels_on(CROPS[0], batch=batch)
            inputs = [tensor for own in student for tensor in (own.query, own.key)]

            def fused() -> None:
                torch.autograd.grad(crp_loss(student, teacher, labels, num_labels=256), inputs)  # noqa: B023

            def chunks() -> None:
                with patch.object(attention_module, '_fused_kernels', lambda device: None):
                    fused()

            seconds = median_seconds({'fused': fused, 'chunks': chunks})
            ratios.append(
                Ratio(
                    f'attention loss, {precision}, batch {batch}: speed of the kernels over chunks',
                    seconds['chunks'] / seconds['fused'],
                    1.3,
                    more_is_better=True,
                    detail=f'{1000 * seconds["fused"]:.1f} instead of {1000 * seconds["chunks"]:.1f} ms',
                )
            )
    return ratios


def _cast(own: AttentionMap, dtype: torch.dtype | None) -> AttentionMap:
    """The map as autocast hands it out."""
    if dtype is None:
        return own
    query, key = (tensor.detach().to(dtype).requires_grad_() for tensor in (own.query, own.key))
    return replace(own, query=query, key=key)


def loop_loss(student: list[AttentionMap], teacher: list[AttentionMap], labels: Tensor) -> Tensor:
    """Eq. (1) and (2) the way the field writes them: dense maps, one mask at a time.

    The labels go through the CPU to be resized for each block and image; every class of every image
    masks the whole map of every head.
    """
    total = student[0].query.new_zeros(())
    for new, old in zip(student, teacher, strict=True):
        maps, old_maps = new.dense(), old.dense().detach()
        for image in range(len(labels)):
            small = F.interpolate(labels[image].cpu()[None, None].float(), new.query_hw, mode='nearest')
            small = small.flatten().to(labels.device)
            classes = [label for label in small.unique().tolist() if label not in (0, 255)]
            for label in classes:
                mask = (small == label).float()[:, None]
                for head in range(new.num_heads):
                    means = [
                        (own[image, head] * mask).sum(0) / mask.sum() for own in (maps, old_maps)
                    ]
                    distance = torch.linalg.vector_norm(means[0] - means[1])
                    total = total + distance / (new.num_heads * len(classes) * len(labels))
    return total / len(student)
