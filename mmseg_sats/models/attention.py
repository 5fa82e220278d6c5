# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-attention as a value: a layer's queries and keys, the map computed only when asked.

A dense map of MiT's first stage at a 512 crop has 128^2 x 256 entries per head and image.
Self-attention transfer needs only its mean over each class region, eq. (1) of Qiu et al., *SATS:
Self-Attention Transfer for continual semantic Segmentation* (Pattern Recognition 2023), so the rows
of a region are computed in chunks, averaged, and computed once more in the backward pass instead of
being stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# How many entries of the map exist at a time, by device type. A CPU wants a chunk that stays in its
# cache; an accelerator wants few and large kernels. Backward holds two such arrays.
CHUNK_ELEMENTS = {'cpu': 2**18}
DEFAULT_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True, eq=False)
class ClassRegions:
    """The class regions of a batch of label maps: each foreground class's positions in each image.

    Args:
        image: (R,) long, the image of each region; regions are ordered by image, then class.
        label: (R,) long, the class of each region.
        slot: (R,) long, the region's number within its image.
        count: (R,) long, the region's number of positions.
        slots: (B, L) long, for each position the slot of its region, -1 on background and ignore.
        presence: (B, K) bool, which foreground labels below K each image has.
        rows: for each image, its number of foreground positions.
        width: the largest number of regions in an image.
    """

    image: Tensor
    label: Tensor
    slot: Tensor
    count: Tensor
    slots: Tensor
    presence: Tensor
    rows: tuple[int, ...]
    width: int

    @cached_property
    def order(self) -> Tensor:
        """(B, L) long: each image's positions, those of the foreground first."""
        foreground = self.slots >= 0
        ahead = foreground.cumsum(1)
        position = torch.arange(ahead.shape[1], device=ahead.device).expand_as(ahead)
        place = torch.where(foreground, ahead - 1, ahead[:, -1:] + position - ahead)
        return torch.empty_like(place).scatter_(1, place, position)

    def membership(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """One-hot regions (..., width, P) of positions with the given ``slots`` (..., P)."""
        number = torch.arange(self.width, device=slots.device)
        return (slots.unsqueeze(-2) == number.unsqueeze(-1)).to(dtype)


def find_regions(
    labels: Tensor, ignore_index: int = 255, num_labels: int | None = None
) -> ClassRegions:
    """Find the class regions of label maps, background (0) and ``ignore_index`` left out.

    Args:
        labels: (B, h, w) integer labels.
        ignore_index: the label that belongs to no class.
        num_labels: an upper bound of the labels, where known; spares a device synchronisation.

    Raises:
        ValueError: if a label other than ``ignore_index`` is negative.
    """
    labels = labels.flatten(1).long()
    if num_labels is None:
        num_labels = count_labels(labels, ignore_index)
    foreground = (labels != 0) & (labels != ignore_index)
    labels = labels.where(foreground, 0)
    counts = labels.new_zeros(len(labels), num_labels)
    counts.scatter_add_(1, labels, foreground.long())
    presence = counts > 0
    # One copy to the host tells every size that is needed there.
    host_counts = counts.cpu()
    image, label = host_counts.nonzero(as_tuple=True)
    host_slots = (host_counts > 0).cumsum(1) - 1
    host_regions = torch.stack([image, label, host_slots[image, label], host_counts[image, label]])
    regions = host_regions.to(labels.device, non_blocking=True)
    slots = (presence.cumsum(1) - 1).gather(1, labels).masked_fill_(~foreground, -1)
    return ClassRegions(
        *regions.unbind(),
        slots=slots,
        presence=presence,
        rows=tuple(host_counts.sum(1).tolist()),
        width=int(host_slots.max()) + 1 if len(image) else 0,
    )


def count_labels(labels: Tensor, ignore_index: int = 255) -> int:
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
class AttentionMap:
    """The attention of one layer, softmax(query key^T * scale), before attention dropout.

    Everything computed from it is float32, or float64 where the inputs are; autocast has no say.

    Args:
        query: (B, heads, L, d) projected queries.
        key: (B, heads, S, d) projected keys.
        scale: the factor of the dot products, d ** -0.5 in the usual attention.
        query_hw: (h, w) of the query grid, L = h * w.
        key_hw: (h, w) of the key grid, S = extra_keys + h * w.
        extra_keys: how many keys stand before those of the grid and lie on no place of the image, e.g.
            1 for a class token.

    Raises:
        ValueError: if the shapes do not agree.
    """

    query: Tensor
    key: Tensor
    scale: float
    query_hw: tuple[int, int]
    key_hw: tuple[int, int]
    extra_keys: int = 0

    def __post_init__(self) -> None:
        query, key = tuple(self.query.shape), tuple(self.key.shape)
        if len(query) != 4 or len(key) != 4 or query[:2] + query[3:] != key[:2] + key[3:]:
            raise ValueError(
                'query must be (B, heads, L, d) and key (B, heads, S, d) with the same B, heads'
                f' and d, got {query} and {key}'
            )
        for name in ('query_hw', 'key_hw'):  # lists would not do as keys of a dict
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, length, (height, width) in (
            ('query', query[2], self.query_hw),
            ('key', key[2] - self.extra_keys, self.key_hw),
        ):
            if length != height * width:
                raise ValueError(f'{name}_hw {(height, width)} does not hold {length} positions')

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self.query.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, L, S), the shape that ``dense`` would have."""
        return (*self.query.shape[:3], self.key.shape[2])

    def detach(self) -> 'AttentionMap':
        """The same map, cut off from the graph."""
        return replace(self, query=self.query.detach(), key=self.key.detach())

    def dense(self) -> Tensor:
        """The whole map, (B, heads, L, S)."""
        return attend(self.query, self.key, self.scale)

    def rows(self, start: int, stop: int) -> Tensor:
        """The map's rows of the query positions ``start:stop``, (B, heads, stop - start, S)."""
        return attend(self.query[:, :, start:stop], self.key, self.scale)

    def pool(self, labels: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor, Tensor]:
        """Mean attention of each class region, eq. (1) of SATS, without building the map.

        Args:
            labels: (B, h, w) integer labels on the query grid; 0 is background.
            ignore_index: the label that belongs to no class.

        Returns:
            The means (R, heads, S), the image (R,) and the class (R,) of each region, ordered by
            image and class. R is 0 where no image has a class; the result still belongs to the
            graph then.

        Raises:
            ValueError: if the labels do not lie on the query grid or are not integers.
        """
        expected = (self.query.shape[0], *self.query_hw)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f'labels must be on the query grid {expected}, got {tuple(labels.shape)}'
            )
        if labels.is_floating_point():
            raise ValueError(f'labels must be integers, got {labels.dtype}')
        regions = find_regions(labels, ignore_index)
        return self.pool_regions(regions), regions.image, regions.label

    def pool_regions(self, regions: ClassRegions) -> Tensor:
        """The means (R, heads, S) of ``pool``, for regions found by ``find_regions``."""
        return _RegionMean.apply(self.query, self.key, self.scale, regions)


def attend(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(query key^T * scale), (..., P, S), of queries (..., P, d) and keys (..., S, d)."""
    with full_precision(query):
        dtype = working_dtype(query, key)
        return (query.to(dtype) @ (key.to(dtype) * scale).mT).softmax(-1)


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context that turns autocast off on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The tensors' common dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def chunk_elements(tensor: Tensor) -> int:
    """How many entries of a map may exist at a time on the tensor's device."""
    return CHUNK_ELEMENTS.get(tensor.device.type, DEFAULT_CHUNK_ELEMENTS)


class _Chunk(NamedTuple):
    """Part of the foreground rows: some images, and one range of ordered positions in each."""

    images: slice
    rows: slice


def _chunks(rows: Sequence[int], row_elements: int, limit: int) -> Iterator[_Chunk]:
    """Cover all images' rows by chunks of at most ``limit`` elements (or of a single row).

    Neighbouring images share a chunk as long as they fit with the rows of the longest; an image too
    large for one chunk has several to itself.
    """
    size = max(1, limit // row_elements)
    start = 0
    while start < len(rows):
        stop, longest = start + 1, rows[start]
        while stop < len(rows) and (stop + 1 - start) * max(longest, rows[stop]) <= size:
            longest = max(longest, rows[stop])
            stop += 1
        for first in range(0, longest, size):
            yield _Chunk(slice(start, stop), slice(first, min(first + size, longest)))
        start = stop


class _Rows:
    """The chosen rows of a batch of attention maps, chunk by chunk."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, regions: ClassRegions) -> None:
        self.batch, self.heads, self.length, self.dim = query.shape
        self.dtype = working_dtype(query, key)
        # (B * L, heads, d): a view for queries that come out of a linear layer, and fast to gather
        # from.
        self.query = query.transpose(1, 2).flatten(0, 1)
        self.key = key.to(self.dtype) * scale
        self.regions = regions
        first = torch.arange(self.batch, device=query.device).unsqueeze(1) * self.length
        self.order = regions.order + first

    def chunks(self) -> Iterator[_Chunk]:
        row_elements = max(1, self.heads * self.key.shape[2])
        return _chunks(self.regions.rows, row_elements, chunk_elements(self.query))

    def positions(self, chunk: _Chunk) -> Tensor:
        """Flat positions (n * P,) of the chunk's rows in the batch."""
        return self.order[chunk.images, chunk.rows].reshape(-1)

    def queries(self, chunk: _Chunk) -> Tensor:
        """(n, heads, P, d)"""
        count = chunk.images.stop - chunk.images.start
        rows = self.query.index_select(0, self.positions(chunk)).to(self.dtype)
        return rows.view(count, -1, self.heads, self.dim).transpose(1, 2)

    def attention(self, queries: Tensor, chunk: _Chunk) -> Tensor:
        """(n, heads, P, S)"""
        return (queries @ self.key[chunk.images].mT).softmax(-1)

    def membership(self, chunk: _Chunk) -> Tensor:
        """(n, 1, width, P): one where a row belongs to a region; a row that only pads has none."""
        order = self.regions.order[chunk.images, chunk.rows]
        slots = self.regions.slots[chunk.images].gather(1, order)
        return self.regions.membership(slots, self.dtype).unsqueeze(1)


class _RegionMean(torch.autograd.Function):
    """Region means (R, heads, S) of the attention; saves queries, keys and positions alone."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, regions: ClassRegions
    ) -> Tensor:
        """Means (R, heads, S) from queries (B, heads, L, d) and keys (B, heads, S, d)."""
        ctx.save_for_backward(query, key)
        ctx.scale, ctx.regions = scale, regions
        with full_precision(query):
            rows = _Rows(query, key, scale, regions)
            sums = rows.key.new_zeros(rows.batch, rows.heads, regions.width, key.shape[2])
            for chunk in rows.chunks():
                attention = rows.attention(rows.queries(chunk), chunk)
                sums[chunk.images] += rows.membership(chunk) @ attention
            return sums[regions.image, :, regions.slot] / regions.count[:, None, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients like queries and keys, from that of the means (R, heads, S)."""
        query, key = ctx.saved_tensors
        with full_precision(query):
            rows = _Rows(query, key, ctx.scale, ctx.regions)
            grad_query = rows.query.new_zeros(rows.query.shape)
            grad_key = torch.zeros_like(rows.key)
            grad_sums = _unpool(grad, ctx.regions, rows)
            for chunk in rows.chunks():
                queries = rows.queries(chunk)
                attention = rows.attention(queries, chunk)
                grad_scores = rows.membership(chunk).mT @ grad_sums[chunk.images]
                _softmax_backward_(grad_scores, attention)
                grad_rows = (grad_scores @ rows.key[chunk.images]).transpose(1, 2).flatten(0, 1)
                grad_query.index_copy_(0, rows.positions(chunk), grad_rows.to(query.dtype))
                grad_key[chunk.images] += grad_scores.mT @ queries
        grad_query = grad_query.unflatten(0, (rows.batch, rows.length)).transpose(1, 2)
        return grad_query, (grad_key * ctx.scale).to(key.dtype), None, None


def _unpool(grad: Tensor, regions: ClassRegions, rows: _Rows) -> Tensor:
    """Gradient (B, heads, width, S) of region sums, from that of region means (R, heads, S)."""
    sums = grad.new_zeros(rows.batch, regions.width, *grad.shape[1:])
    sums[regions.image, regions.slot] = grad / regions.count[:, None, None]
    return sums.transpose(1, 2)


def _softmax_backward_(grad: Tensor, probabilities: Tensor) -> None:
    """Turn, in place, the gradient of a softmax's output into that of its input."""
    grad.mul_(probabilities)
    grad.addcmul_(probabilities, grad.sum(-1, keepdim=True), value=-1)
