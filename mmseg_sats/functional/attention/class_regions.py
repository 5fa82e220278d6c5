# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The positions of the foreground classes of a batch of labels, on one grid or several at once.

The number of positions of each class determines the sizes of later tensors, so it must be read from the
GPU. Such a read waits for the GPU, so it is made only once for all grids of a backbone.
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
    """The class regions of a batch of label maps: the positions of each foreground class in each image.

    The regions of an image are numbered 0, 1, ... in the order of their classes; this number is a
    region's slot.

    Args:
        slots: (B, L) long, the slot of the region of each position, -1 for background and ignore.
        order: (B, L) long, the positions of each image, those of the foreground first. Positions of
            image b are counted from b * L.
        ordered_slots: (B, L) long, the slots in that order.
        shares: (B, width) float64, the weight of a position in the mean of each region: 1 / the region's
            number of positions, or 0 for slots without a region.
        presence: (B, K) bool, on the CPU, which foreground labels below K each image has.
        table: (4, R) long, on the CPU: image, class, slot and number of positions of each region,
            ordered by image, then class.
        rows: the number of foreground positions of each image.
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
        """The number of slots of an image."""
        return self.shares.shape[1]

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image, class, slot and number of positions of each region, (R,) long each."""
        return self.table.to(self.slots.device, non_blocking=True).unbind()

    @cached_property
    def positions(self) -> Tensor:
        """(B, longest): the foreground positions of ``order``; shorter images are padded with background positions."""
        return self.order[:, : max(self.rows, default=0)].contiguous()

    @cached_property
    def pads(self) -> Tensor:
        """(B, longest) bool: which of ``positions`` are padding, i.e. background."""
        return self.ordered_slots[:, : self.positions.shape[1]] < 0

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(B, width, longest): the weight of each of ``positions`` in the means of the image's regions."""
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
    """Finds the class regions of label maps, without background (0) and ``ignore_index``.

    Args:
        labels: (B, h, w) integer labels.
        ignore_index: the label that belongs to no class.
        num_labels: a number that all labels are below, if known; saves a device synchronisation.

    Raises:
        ValueError: if a label other than ``ignore_index`` is negative or not below ``num_labels``.
    """
    flat = labels.flatten(1).long()
    if num_labels is None:
        num_labels = _count_labels(flat, ignore_index)
    return _find(flat, (flat.shape[1],), ignore_index, num_labels)[0]


def find_regions_on_grids(
    labels: Tensor, grids: Sequence[Grid], ignore_index: int = 255, num_labels: int | None = None
) -> dict[Grid, ClassRegions]:
    """Finds the regions on several grids (h, w), to which labels (B, H, W) are resized by nearest neighbour.

    With ``num_labels``, only the labels that are used on a grid are checked.
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
    """The regions of (B, P) long labels, which are the positions of all grids, one grid after the other.

    Raises:
        ValueError: if a label other than ``ignore_index`` is not in 0..num_labels - 1.
    """
    cells = num_labels + 1
    batch, device = len(labels), labels.device
    layout = _layout(batch, lengths, device)
    foreground = (labels != 0) & (labels != ignore_index)
    # All labels out of range become `num_labels`; for -1 this is done by the remainder.
    known = labels.where(foreground, 0).clamp(-1, num_labels) % cells
    cell = known + layout.grid * cells
    counts = labels.new_zeros(batch, len(lengths) * cells)
    counts.scatter_add_(1, cell, foreground.long())
    # Work that does not depend on the counts is queued on the device before waiting for them.
    slots = ((counts > 0).view(batch, len(lengths), cells).cumsum(2) - 1).flatten(1).gather(1, cell)
    slots.masked_fill_(~foreground, -1)
    place = layout.foreground_first(foreground)
    order = torch.empty_like(place).scatter_(1, place, layout.position.expand_as(place))
    ordered_slots = torch.empty_like(place).scatter_(1, place, slots)
    # A single copy to the CPU provides all sizes.
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
    # A single copy to the device; each grid gets a view of it.
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
    """The largest label except ``ignore_index``, plus one. This synchronises with the device once.

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
    """The positions of several grids one after the other, P in all, for B images.

    Args:
        grid: (P,) long, the index of each position's grid.
        start: (P,) long, the first position of that grid.
        last: (grids,) long, the last position of each grid.
        position: (B, P) long, each position's index within its grid. Those of image b are counted from b
            times the grid's length.
    """

    grid: Tensor
    start: Tensor
    last: Tensor
    position: Tensor

    def foreground_first(self, foreground: Tensor) -> Tensor:
        """The new index (B, P) of each position if, in each grid, the foreground positions are moved to the front."""
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
    """The index of the pixel, of H * W, that ``F.interpolate(mode='nearest')`` takes for each position of the grids."""
    with torch.inference_mode(False):
        flat = [
            _nearest_places(size[0], grid[0])[:, None] * size[1] + _nearest_places(size[1], grid[1])
            for grid in grids
        ]
        return torch.cat([places.flatten() for places in flat]).to(device)


def _nearest_places(source: int, size: int) -> Tensor:
    """(size,): the source index for each position along an axis, found by resizing the indices in float32."""
    axis = torch.arange(source, dtype=torch.float32).view(1, 1, source, 1)
    return F.interpolate(axis, (size, 1), mode='nearest').flatten().long()


@lru_cache(maxsize=64)
def _numbers(stop: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(stop, device=device)
