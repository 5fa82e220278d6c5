# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""An attention map that holds a layer's queries and keys and computes the attention only on demand.

A dense map of MiT's first block at a 512 crop has 128^2 x 256 entries per head and image.
Self-attention transfer needs only its mean over each class region, eq. (1) of Qiu et al., *SATS:
Self-Attention Transfer for continual semantic Segmentation* (Pattern Recognition 2023). So the rows of
the regions are computed in chunks and averaged. They are not stored but computed again in the backward
pass.
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

from mmseg_sats.functional.attention.base import BaseAttentionMap, Measure, attend
from mmseg_sats.functional.attention.class_regions import ClassRegions
from mmseg_sats.functional.precision import full_precision, working_dtype

# How many entries of the map are computed at a time, by device type. On a CPU, a chunk should fit into the
# cache; an accelerator needs few large kernels. The backward pass needs three arrays of this size.
CHUNK_ELEMENTS = {'cpu': 2**17}
DEFAULT_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMap(BaseAttentionMap):
    """The attention of one layer, softmax(query key^T * scale), before attention dropout.

    All results are float32, or float64 if the inputs are; autocast has no effect.

    Args:
        query: (B, heads, L, d) projected queries.
        key: (B, heads, S, d) projected keys.
        scale: the factor of the dot products, usually d ** -0.5.
        query_hw: (h, w) of the query grid, L = h * w.
        key_hw: (h, w) of the key grid, S = extra_keys + h * w.
        extra_keys: how many keys come before those of the grid and have no position in the image, e.g.
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
        for name in ('query_hw', 'key_hw'):  # grids are used as keys of a dict, so they cannot be lists
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
        """The same map, detached from the graph."""
        return replace(self, query=self.query.detach(), key=self.key.detach())

    def rows(self, start: int, stop: int) -> Tensor:
        """Computes the rows of the query positions ``start:stop``, (B, heads, stop - start, S)."""
        return attend(self.query[:, :, start:stop], self.key, self.scale)

    def pool_regions(self, regions: ClassRegions) -> Tensor:
        """Computes the means of ``pool`` by image and slot, (B, heads, width, S); 0 for slots without a region."""
        fused = _fused_kernels(self.query.device)
        if fused and fused.can_fuse(self.query, self.key, regions):
            return fused.FusedRegionMean.apply(self.query, self.key, self.scale, regions)
        return _RegionMean.apply(self.query, self.key, self.scale, regions)

    def mean_row_distance(self, other: 'AttentionMap', measure: Measure) -> Tensor:
        """Computes, for each row, ``measure`` of the two maps, and its mean over all rows: (B, heads).

        Rows are computed in chunks, and computed again in the backward pass.
        """

        def row_distance(new: Tensor, old: Tensor) -> Tensor:
            rows = attend(new, self.key, self.scale)
            return measure(rows, attend(old, other.key, other.scale)).sum(2)

        batch, heads, length, keys = self.shape
        size = max(1, chunk_elements(self.query) // max(1, batch * heads * keys))
        chunks = zip(self.query.split(size, 2), other.query.split(size, 2), strict=True)
        # split instead of slices, so that the gradients of all chunks are joined only once.
        sums = [
            checkpoint(row_distance, new, old, use_reentrant=False, preserve_rng_state=False)
            for new, old in chunks
        ]
        return torch.stack(sums).sum(0) / length


@lru_cache
def _fused_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels for an NVIDIA GPU of the Ampere generation or later; None for other devices."""
    if device.type != 'cuda' or not torch.version.cuda or not find_spec('triton'):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernels = import_module('mmseg_sats.functional.attention.triton_pooling')
    return kernels if kernels.kernels_run(device) else None


def chunk_elements(tensor: Tensor) -> int:
    """How many entries of a map may be computed at a time on the tensor's device."""
    return CHUNK_ELEMENTS.get(tensor.device.type, DEFAULT_CHUNK_ELEMENTS)


class _Chunk(NamedTuple):
    """A part of the foreground's rows: some images, and the same range of ordered positions in each of them."""

    images: slice
    rows: slice


def _chunks(rows: Sequence[int], row_elements: int, limit: int, padded: bool) -> Iterator[_Chunk]:
    """Divides all images' rows into chunks of at most ``limit`` elements (or of a single row).

    Consecutive images are put into one chunk if they fit. They must have the same number of rows unless
    they may be ``padded`` to that of the longest. An image that is too large gets several chunks.

    Args:
        rows: the number of rows of each image.
        row_elements: the number of elements of a row.
        limit: the largest number of elements of a chunk.
        padded: whether images with fewer rows may be padded.
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
    """Computes the foreground's rows of a batch of attention maps chunk by chunk."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, regions: ClassRegions) -> None:
        self.batch, self.heads, self.length, self.dim = query.shape
        self.dtype = working_dtype(query, key)
        # (B * L, heads, d): a view if the queries come from a linear layer, and fast to gather from.
        self.query = query.transpose(1, 2).flatten(0, 1)
        # A contiguous copy is made once, since every product would copy keys that are not contiguous.
        self.key = torch.empty(key.shape, dtype=self.dtype, device=key.device).copy_(key).mul_(scale)
        self.positions = regions.positions
        self.pads = regions.pads
        self.weights = regions.weights(self.dtype)
        self.rows = regions.rows

    def chunks(self) -> Iterator[_Chunk]:
        row_elements = max(1, self.heads * self.key.shape[2])
        # On an accelerator, computing some padded rows is faster than launching kernels for every image.
        padded = self.query.device.type not in CHUNK_ELEMENTS
        return _chunks(self.rows, row_elements, chunk_elements(self.query), padded)

    def flat_positions(self, chunk: _Chunk) -> Tensor:
        """The flat positions (n * P,) of the chunk's rows in the batch."""
        return self.positions[chunk.images, chunk.rows].reshape(-1)

    def queries(self, chunk: _Chunk) -> Tensor:
        """The queries of the chunk's rows, (n, heads, P, d)."""
        count = chunk.images.stop - chunk.images.start
        rows = self.query.index_select(0, self.flat_positions(chunk)).view(count, -1, self.heads, self.dim)
        # Padding rows are background, which must have no effect even if it is not finite: 0 * inf is NaN.
        rows.masked_fill_(self.pads[chunk.images, chunk.rows, None, None], 0)
        return rows.transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format)

    def attention(self, queries: Tensor, chunk: _Chunk) -> Tensor:
        """The attention of these queries, (n, heads, P, S)."""
        return (queries @ self.key[chunk.images].mT).softmax(-1)

    def shares(self, chunk: _Chunk) -> Tensor:
        """The weights of the rows in the means, (n, 1, width, P); 0 for padding rows."""
        return self.weights[chunk.images, :, chunk.rows].unsqueeze(1)


class _RegionMean(torch.autograd.Function):
    """Region means of the attention. Only queries, keys and positions are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, regions: ClassRegions
    ) -> Tensor:
        """Computes means (B, heads, width, S) from queries (B, heads, L, d) and keys (B, heads, S, d)."""
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
        """Computes the gradients of queries and keys from that of the means (B, heads, width, S)."""
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
