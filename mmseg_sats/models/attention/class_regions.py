# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Where the foreground classes of a batch of labels lie, on one grid or several at once.

A GPU computes in the background until its results are asked for. How many positions a class has
decides the sizes of what follows, so it must be asked for; once for all the grids of a backbone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ClassRegions:
    """The class regions of a batch of label maps: each foreground class's positions in each image.

    Those of an image have the slots 0, 1, ... in the order of their classes.

    Args:
        slots: (B, L) long, for each position the slot of its region, -1 on background and ignore.
        order: (B, L) long, each image's positions, those of the foreground first; image b's are
            counted from b * L.
        ordered_slots: (B, L) long, the slots in that order.
        shares: (B, width) float64, what a position of each region is to the region's mean: 1 / its
            number of positions, or 0 where the image has fewer regions.
        presence: (B, K) bool, on the CPU, which foreground labels below K each image has.
        table: (4, R) long, on the CPU: image, class, slot and number of positions of each region,
            ordered by image, then class.
        rows: for each image, its number of foreground positions.
    """

    slots: Tensor
    order: Tensor
    ordered_slots: Tensor
    shares: Tensor
    presence: Tensor
    table: Tensor
    rows: tuple[int, ...]
    _weights: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def width(self) -> int:
        """The slots of an image."""
        return self.shares.shape[1]

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image, class, slot and number of positions of each region, (R,) long each."""
        return self.table.to(self.slots.device, non_blocking=True).unbind()

    @cached_property
    def positions(self) -> Tensor:
        """(B, longest): the foreground's part of ``order``; images with less go on in background."""
        return self.order[:, : max(self.rows, default=0)].contiguous()

    @cached_property
    def pads(self) -> Tensor:
        """(B, longest) bool: which of ``positions`` are background that only pads a row."""
        return self.ordered_slots[:, : self.positions.shape[1]] < 0

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(B, width, longest): each of ``positions`` in the means of the image's regions."""
        if dtype not in self._weights:
            slots = self.ordered_slots[:, : self.positions.shape[1]].unsqueeze(1)
            number = _numbers(self.width, slots.device).unsqueeze(1)
            self._weights[dtype] = torch.where(
                slots == number, self.shares.to(dtype).unsqueeze(2), 0
            )
        return self._weights[dtype]


def find_regions(
    labels: Tensor, ignore_index: int = 255, num_labels: int | None = None
) -> ClassRegions:
    """The class regions of label maps, background (0) and ``ignore_index`` left out.

    Args:
        labels: (B, h, w) integer labels.
        ignore_index: the label that belongs to no class.
        num_labels: an upper bound of the labels, where known; spares a device synchronisation.

    Raises:
        ValueError: if a label other than ``ignore_index`` is negative, or not under the bound.
    """
    flat = labels.flatten(1).long()
    if num_labels is None:
        num_labels = _count_labels(flat, ignore_index)
    return _find(flat, (flat.shape[1],), ignore_index, num_labels)[0]


def find_regions_on_grids(
    labels: Tensor, grids: Sequence[Grid], ignore_index: int = 255, num_labels: int | None = None
) -> dict[Grid, ClassRegions]:
    """The same on several grids (h, w), to which labels (B, H, W) are brought by nearest neighbour.

    With a bound, those labels alone are looked at that a grid takes.
    """
    if num_labels is None:
        num_labels = _count_labels(labels.long(), ignore_index)
    unique = tuple(dict.fromkeys(grids))
    places = _nearest(tuple(labels.shape[1:]), unique, labels.device)
    flat = labels.flatten(1).index_select(1, places).long()
    lengths = tuple(height * width for height, width in unique)
    return dict(zip(unique, _find(flat, lengths, ignore_index, num_labels), strict=True))


def _find(
    labels: Tensor, lengths: tuple[int, ...], ignore_index: int, num_labels: int
) -> list[ClassRegions]:
    """The regions of (B, P) long labels, in which the grids' positions stand one grid after the other.

    Raises:
        ValueError: if a label other than ``ignore_index`` is not in 0..num_labels - 1.
    """
    cells = num_labels + 1
    batch, device = len(labels), labels.device
    layout = _layout(batch, lengths, device)
    foreground = (labels != 0) & (labels != ignore_index)
    # Label `num_labels` stands for all that are out of range: -1 is so in remainders.
    known = labels.where(foreground, 0).clamp(-1, num_labels) % cells
    cell = known + layout.grid * cells
    counts = labels.new_zeros(batch, len(lengths) * cells)
    counts.scatter_add_(1, cell, foreground.long())
    # What needs no answer is asked of the device before it is waited for.
    slots = ((counts > 0).view(batch, len(lengths), cells).cumsum(2) - 1).flatten(1).gather(1, cell)
    slots.masked_fill_(~foreground, -1)
    place = layout.foreground_first(foreground)
    order = torch.empty_like(place).scatter_(1, place, layout.position.expand_as(place))
    ordered_slots = torch.empty_like(place).scatter_(1, place, slots)
    # One copy to the host tells every size that is needed there.
    host = counts.cpu().view(batch, len(lengths), cells).transpose(0, 1)
    if host[..., num_labels].any():
        wrong = labels[known == num_labels].unique().tolist()
        raise ValueError(
            f'labels must be in 0..{num_labels - 1} or ignore_index={ignore_index}, got {wrong}'
        )
    presence = host > 0
    host_slots = presence.cumsum(2) - 1
    grid, image, label = presence.nonzero(as_tuple=True)
    slot, count = host_slots[grid, image, label], host[grid, image, label]
    tables = torch.stack([image, label, slot, count]).split(
        torch.bincount(grid, minlength=len(lengths)).tolist(), dim=1
    )
    width = int(slot.max()) + 1 if len(slot) else 0
    shares = torch.zeros(*host.shape[:2], width, dtype=torch.float64)
    shares[grid, image, slot] = count.double().reciprocal()
    # One copy to the device, and the rest are views of it.
    shares = shares.to(device, non_blocking=True)
    return [
        ClassRegions(*parts)
        for parts in zip(
            slots.split(lengths, 1),
            order.split(lengths, 1),
            ordered_slots.split(lengths, 1),
            shares,
            presence[..., :num_labels],
            tables,
            map(tuple, host.sum(2).tolist()),
            strict=True,
        )
    ]


def _count_labels(labels: Tensor, ignore_index: int) -> int:
    """The largest of the long labels plus one, ``ignore_index`` aside; one device synchronisation.

    Raises:
        ValueError: if a label other than ``ignore_index`` is negative.
    """
    if not labels.numel():
        return 1
    low, high = torch.stack(labels.masked_fill(labels == ignore_index, 0).aminmax()).tolist()
    if low < 0:
        raise ValueError(f'labels must not be negative (ignore_index is {ignore_index}), got {low}')
    return int(high) + 1


@dataclass(frozen=True, eq=False)
class _Layout:
    """Several grids' positions in a row, P in all, for B images.

    Args:
        grid: (P,) long, the grid of each position.
        start: (P,) long, where that grid starts.
        last: (grids,) long, where each grid ends.
        position: (B, P) long, the number within the grid, image b's counted from b times its length.
    """

    grid: Tensor
    start: Tensor
    last: Tensor
    position: Tensor

    def foreground_first(self, foreground: Tensor) -> Tensor:
        """The place (B, P) of each position once the foreground's stand first in each grid."""
        ahead = foreground.cumsum(1)
        until = F.pad(ahead.index_select(1, self.last), (1, 0))
        before = (until[:, :-1].index_select(1, self.grid), until[:, 1:].index_select(1, self.grid))
        everywhere = _numbers(len(self.grid), ahead.device)
        return torch.where(
            foreground, self.start - 1 + ahead - before[0], everywhere + before[1] - ahead
        )


@lru_cache(maxsize=16)
def _layout(batch: int, lengths: tuple[int, ...], device: torch.device) -> _Layout:
    with torch.inference_mode(False):
        sizes = torch.tensor(lengths)
        stops = sizes.cumsum(0)
        grid = torch.arange(len(lengths)).repeat_interleave(sizes)
        start = (stops - sizes)[grid]
        image = torch.arange(batch).unsqueeze(1)
        position = torch.arange(len(grid)) - start + image * sizes[grid]
        return _Layout(*(own.to(device) for own in (grid, start, stops - 1, position)))


@lru_cache(maxsize=16)
def _nearest(size: Grid, grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """For each position of the grids, which of H * W pixels it takes, by torch's own rule."""
    with torch.inference_mode(False):
        flat = [
            _nearest_places(size[0], grid[0])[:, None] * size[1] + _nearest_places(size[1], grid[1])
            for grid in grids
        ]
        return torch.cat([places.flatten() for places in flat]).to(device)


def _nearest_places(source: int, size: int) -> Tensor:
    """(size,): the place that each takes of an axis, in float32, in which labels would be resized."""
    axis = torch.arange(source, dtype=torch.float32).view(1, 1, source, 1)
    return F.interpolate(axis, (size, 1), mode='nearest').flatten().long()


@lru_cache(maxsize=64)
def _numbers(stop: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(stop, device=device)
