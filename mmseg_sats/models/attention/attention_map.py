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
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmseg_sats.models.attention.base import BaseAttentionMap, Measure, attend
from mmseg_sats.models.attention.class_regions import ClassRegions
from mmseg_sats.models.precision import full_precision, working_dtype

# How many entries of the map exist at a time, by device type. A CPU wants a chunk that stays in its
# cache; an accelerator wants few and large kernels. Backward holds three such arrays.
CHUNK_ELEMENTS = {'cpu': 2**17}
DEFAULT_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True, eq=False)
class AttentionMap(BaseAttentionMap):
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
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, L, S), the shape that ``dense`` would have."""
        return (*self.query.shape[:3], self.key.shape[2])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Queries and keys."""
        return self.query, self.key

    def detach(self) -> 'AttentionMap':
        """The same map, cut off from the graph."""
        return replace(self, query=self.query.detach(), key=self.key.detach())

    def rows(self, start: int, stop: int) -> Tensor:
        """The map's rows of the query positions ``start:stop``, (B, heads, stop - start, S)."""
        return attend(self.query[:, :, start:stop], self.key, self.scale)

    def pool_regions(self, regions: ClassRegions) -> Tensor:
        """The means of ``pool`` by image and slot, (B, heads, width, S); 0 where a slot is free."""
        fused = _fused_kernels(self.query.device)
        if fused and fused.can_fuse(self.query, self.key, regions):
            return fused.FusedRegionMean.apply(self.query, self.key, self.scale, regions)
        return _RegionMean.apply(self.query, self.key, self.scale, regions)

    def mean_row_distance(self, other: 'AttentionMap', measure: Measure) -> Tensor:
        """(B, heads): the mean over all positions of the measure of the two maps' difference of rows.

        A few rows are computed at a time, and once more in backward.
        """

        def row_distance(new: Tensor, old: Tensor) -> Tensor:
            rows = attend(new, self.key, self.scale)
            return measure(rows - attend(old, other.key, other.scale)).sum(2)

        batch, heads, length, keys = self.shape
        size = max(1, chunk_elements(self.query) // max(1, batch * heads * keys))
        chunks = zip(self.query.split(size, 2), other.query.split(size, 2), strict=True)
        # split, not slices: the gradients of all the pieces are joined once.
        sums = [
            checkpoint(row_distance, new, old, use_reentrant=False, preserve_rng_state=False)
            for new, old in chunks
        ]
        return torch.stack(sums).sum(0) / length


@lru_cache
def _fused_kernels(device: torch.device) -> ModuleType | None:
    """The kernels for an NVIDIA GPU of the Ampere generation or later, None for other devices."""
    if device.type != 'cuda' or not torch.version.cuda or not find_spec('triton'):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernels = import_module('mmseg_sats.models.attention.triton_pooling')
    return kernels if kernels.kernels_run(device) else None


def chunk_elements(tensor: Tensor) -> int:
    """How many entries of a map may exist at a time on the tensor's device."""
    return CHUNK_ELEMENTS.get(tensor.device.type, DEFAULT_CHUNK_ELEMENTS)


class _Chunk(NamedTuple):
    """Part of the foreground rows: some images, and one range of ordered positions in each."""

    images: slice
    rows: slice


def _chunks(rows: Sequence[int], row_elements: int, limit: int, padded: bool) -> Iterator[_Chunk]:
    """Cover all images' rows by chunks of at most ``limit`` elements (or of a single row).

    Neighbouring images share a chunk as long as they fit, with the rows of the longest where they may be
    ``padded`` and with as many rows each where not; an image too large for one chunk has several to itself.
    """
    size = max(1, limit // row_elements)
    start = 0
    while start < len(rows):
        stop, longest = start + 1, rows[start]
        while stop < len(rows) and (padded or rows[stop] == longest):
            if (stop + 1 - start) * max(longest, rows[stop]) > size:
                break
            longest = max(longest, rows[stop])
            stop += 1
        for first in range(0, longest, size):
            yield _Chunk(slice(start, stop), slice(first, min(first + size, longest)))
        start = stop


class _ForegroundRows:
    """The foreground's rows of a batch of attention maps, chunk by chunk."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, regions: ClassRegions) -> None:
        self.batch, self.heads, self.length, self.dim = query.shape
        self.dtype = working_dtype(query, key)
        # (B * L, heads, d): a view for queries that come out of a linear layer, and fast to gather
        # from.
        self.query = query.transpose(1, 2).flatten(0, 1)
        # Written anew, since products of what is not contiguous would copy it each time.
        self.key = torch.empty(key.shape, dtype=self.dtype, device=key.device).copy_(key).mul_(scale)
        self.positions = regions.positions
        self.pads = regions.pads
        self.weights = regions.weights(self.dtype)
        self.rows = regions.rows

    def chunks(self) -> Iterator[_Chunk]:
        row_elements = max(1, self.heads * self.key.shape[2])
        # An accelerator would rather compute rows of zeros than launch kernels for every image.
        padded = self.query.device.type not in CHUNK_ELEMENTS
        return _chunks(self.rows, row_elements, chunk_elements(self.query), padded)

    def flat_positions(self, chunk: _Chunk) -> Tensor:
        """Flat positions (n * P,) of the chunk's rows in the batch."""
        return self.positions[chunk.images, chunk.rows].reshape(-1)

    def queries(self, chunk: _Chunk) -> Tensor:
        """(n, heads, P, d)"""
        count = chunk.images.stop - chunk.images.start
        rows = self.query.index_select(0, self.flat_positions(chunk)).view(count, -1, self.heads, self.dim)
        # What background holds must not come in, be it multiplied by 0.
        rows.masked_fill_(self.pads[chunk.images, chunk.rows, None, None], 0)
        return rows.transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format)

    def attention(self, queries: Tensor, chunk: _Chunk) -> Tensor:
        """(n, heads, P, S)"""
        return (queries @ self.key[chunk.images].mT).softmax(-1)

    def shares(self, chunk: _Chunk) -> Tensor:
        """(n, 1, width, P): what the rows are to the means; nothing where a row only pads."""
        return self.weights[chunk.images, :, chunk.rows].unsqueeze(1)


class _RegionMean(torch.autograd.Function):
    """Region means of the attention; saves queries, keys and positions alone."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, regions: ClassRegions
    ) -> Tensor:
        """Means (B, heads, width, S) from queries (B, heads, L, d) and keys (B, heads, S, d)."""
        ctx.save_for_backward(query, key)
        ctx.scale, ctx.regions = scale, regions
        with full_precision(query):
            rows = _ForegroundRows(query, key, scale, regions)
            means = rows.key.new_zeros(rows.batch, rows.heads, regions.width, key.shape[2])
            for chunk in rows.chunks():
                attention = rows.attention(rows.queries(chunk), chunk)
                means[chunk.images].add_(rows.shares(chunk) @ attention)
            return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients like queries and keys, from that of the means (B, heads, width, S)."""
        query, key = ctx.saved_tensors
        with full_precision(query):
            rows = _ForegroundRows(query, key, ctx.scale, ctx.regions)
            grad_query = rows.query.new_zeros(rows.query.shape)
            grad_key = torch.zeros_like(rows.key)
            for chunk in rows.chunks():
                queries = rows.queries(chunk)
                attention = rows.attention(queries, chunk)
                grad_rows = rows.shares(chunk).mT @ grad[chunk.images]
                grad_scores = torch._softmax_backward_data(grad_rows, attention, -1, rows.dtype)
                grad_rows = (grad_scores @ rows.key[chunk.images]).transpose(1, 2)
                grad_rows = grad_rows.to(query.dtype, memory_format=torch.contiguous_format)
                grad_query.index_copy_(0, rows.flat_positions(chunk), grad_rows.flatten(0, 1))
                grad_key[chunk.images].add_(grad_scores.mT @ queries)
        grad_query = grad_query.unflatten(0, (rows.batch, rows.length)).transpose(1, 2)
        return grad_query, grad_key.mul_(ctx.scale).to(key.dtype), None, None
