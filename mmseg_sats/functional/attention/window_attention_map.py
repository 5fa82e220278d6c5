# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The attention map of a layer that attends within windows, with an optional bias on the scores.

A row of such a map is a row over all keys of the image that is 0 outside the row's window. Eq. (1) of SATS
takes the means of these rows. So for the keys of a window, a region's mean is the sum of the region's rows
in that window divided by the number of all positions of the region. Since each key is in one window, the
windows are pooled separately, which costs L * tokens instead of L * S.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmseg_sats.functional.attention.attention_map import chunk_elements
from mmseg_sats.functional.attention.base import BaseAttentionMap, Measure, attend
from mmseg_sats.functional.attention.class_regions import ClassRegions, Grid
from mmseg_sats.functional.attention.windows import Windows
from mmseg_sats.functional.precision import full_precision, working_dtype


@dataclass(frozen=True, eq=False, repr=False)
class WindowAttentionMap(BaseAttentionMap):
    """softmax(query key^T * scale + bias) in each window, before attention dropout.

    L is the number of positions of the grid, and S that of all tokens. Tokens without a position (padding
    and extra tokens) are not among the queries, so the map has no rows for them. They are among the keys,
    since the softmax of their window includes them, and come before those of the grid (``extra_keys``).

    Args:
        query: (B, windows.count, heads, windows.tokens, d) projected queries.
        key: (B, windows.count, heads, windows.tokens, d) projected keys.
        scale: the factor of the dot products.
        windows: how the grid is cut into windows.
        bias: added to the scores, e.g. a learned relative position bias and a mask; its shape must expand to
            (windows.count, heads, windows.tokens, windows.tokens). None: no bias.

    Raises:
        ValueError: if the shapes do not agree.
    """

    query: Tensor
    key: Tensor
    scale: float
    windows: Windows
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        shape, windows = tuple(self.query.shape), self.windows
        expected = (windows.count, windows.tokens)
        if len(shape) != 5 or shape != tuple(self.key.shape) or (shape[1], shape[3]) != expected:
            raise ValueError(
                f'query and key must both be (B, {windows.count}, heads, {windows.tokens}, d) for {windows}, '
                f'got {shape} and {tuple(self.key.shape)}'
            )
        if self.bias is not None:
            full = (windows.count, shape[2], windows.tokens, windows.tokens)
            own = (1,) * (4 - self.bias.dim()) + tuple(self.bias.shape)
            if len(own) > 4 or any(one not in (1, all_) for one, all_ in zip(own, full, strict=True)):
                raise ValueError(f'bias must expand to {full}, got {tuple(self.bias.shape)}')

    @property
    def query_hw(self) -> Grid:
        """(h, w) of the grid."""
        return self.windows.hw

    @property
    def key_hw(self) -> Grid:
        """(h, w) of the grid."""
        return self.windows.hw

    @property
    def extra_keys(self) -> int:
        """How many keys have no position in the image."""
        return self.windows.extra_keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, L, S), the shape that ``dense`` would have."""
        length = self.query_hw[0] * self.query_hw[1]
        return self.query.shape[0], self.query.shape[2], length, self.extra_keys + length

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Queries, keys and the bias, if there is one."""
        return (self.query, self.key) if self.bias is None else (self.query, self.key, self.bias)

    def describe(self) -> str:
        """The kind, shape, grid and windows as text."""
        return f'{super().describe()} in windows {self.windows.size} shifted by {self.windows.shift}'

    def detach(self) -> 'WindowAttentionMap':
        """The same map, detached from the graph."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, query=self.query.detach(), key=self.key.detach(), bias=bias)

    def in_windows(self) -> Tensor:
        """The attention between the tokens of each window, (B, windows.count, heads, tokens, tokens)."""
        return attend(self.query, self.key, self.scale, self.bias)

    def rows(self, start: int, stop: int) -> Tensor:
        """Computes the rows of the query positions ``start:stop``, (B, heads, stop - start, S)."""
        device, tokens = self.query.device, self.windows.tokens
        slots = self.windows.slots(device)[self.extra_keys :][start:stop]
        window, token = slots // tokens, slots % tokens
        used, which = window.unique(return_inverse=True)
        bias = None if self.bias is None else self._full_bias()[used]
        attention = attend(self.query[:, used], self.key[:, used], self.scale, bias)
        own = attention[:, which, :, token].permute(1, 2, 0, 3)
        keys = self.windows.keys(device)[window].expand_as(own)
        return own.new_zeros(*own.shape[:3], self.shape[3]).scatter(3, keys, own)

    def pool_regions(self, regions: ClassRegions) -> Tensor:
        """Computes the means of ``pool`` by image and slot, (B, heads, width, S); 0 for slots without a region.

        Windows are computed in chunks, and computed again in the backward pass.
        """
        device, windows = self.query.device, self.windows
        # `region` holds the slot of each token's region (-1: none). This is not the token's slot in `windows`.
        region = F.pad(regions.slots, (self.extra_keys, 0), value=-1)
        region = region.index_select(1, windows.keys(device).flatten())
        region = region.unflatten(1, (windows.count, windows.tokens))
        number = torch.arange(regions.width, device=device).unsqueeze(1)
        shares = regions.shares.to(working_dtype(self.query, self.key))[:, None, :, None]

        def means(query: Tensor, key: Tensor, bias: Tensor, region: Tensor) -> Tensor:
            # Background must have no effect even if it is not finite: 0 * inf is NaN.
            query = query.masked_fill((region < 0)[:, :, None, :, None], 0)
            weights = torch.where(region.unsqueeze(2) == number, shares, 0).unsqueeze(2)
            return weights @ attend(query, key, self.scale, bias)

        with full_precision(self.query):
            parts = self._by_chunks(means, *self._split(), self._chunks(region, 1))
            by_window = torch.cat(parts, 1).permute(0, 2, 3, 1, 4).flatten(3)
            return by_window.index_select(3, windows.slots(device))

    def mean_row_distance(self, other: 'WindowAttentionMap', measure: Measure) -> Tensor:
        """Computes, for each row, ``measure`` of the two maps, and its mean over all rows: (B, heads).

        Windows are computed in chunks, and computed again in the backward pass.

        Raises:
            ValueError: if the other map has other windows.
        """
        if not isinstance(other, WindowAttentionMap) or other.windows != self.windows:
            raise ValueError(
                f'expected the same windows, got {self.describe()} and {other.describe()}'
            )
        placed = self.windows.keys(self.query.device) >= self.extra_keys

        def distances(*own: Tensor) -> Tensor:
            rows = measure(attend(*own[:2], self.scale, own[2]), attend(*own[3:5], other.scale, own[5]))
            return torch.where(own[6].unsqueeze(1), rows, 0).sum((1, 3))

        with full_precision(self.query):
            parts = self._by_chunks(distances, *self._split(), *other._split(), self._chunks(placed, 0))
            return torch.stack(parts).sum(0) / self.shape[2]

    def _full_bias(self) -> Tensor:
        """The bias, or zeros if there is none, (windows.count, heads, tokens, tokens)."""
        bias = self.query.new_zeros(1) if self.bias is None else self.bias
        tokens = self.windows.tokens
        return bias.expand(self.windows.count, self.num_heads, tokens, tokens)

    def _chunks(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Splits a tensor, whose windows are along ``dim``, into chunks of several windows."""
        # This depends only on the shape, so that two maps of the same shape are split in the same way.
        elements = self.shape[0] * self.num_heads * self.windows.tokens**2
        # split instead of slices, so that the gradients of all chunks are joined only once.
        return tensor.split(max(1, chunk_elements(self.query) // max(1, elements)), dim)

    def _split(self) -> tuple[tuple[Tensor, ...], ...]:
        """Queries, keys and bias, each split into chunks."""
        return (
            self._chunks(self.query, 1),
            self._chunks(self.key, 1),
            self._chunks(self._full_bias(), 0),
        )

    @staticmethod
    def _by_chunks(
        work: Callable[..., Tensor], *pieces: tuple[Tensor, ...]
    ) -> list[Tensor]:
        return [
            checkpoint(work, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(*pieces, strict=True)
        ]
