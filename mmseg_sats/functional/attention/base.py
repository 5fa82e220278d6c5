# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The interface of all attention maps, which the losses and the visualization use."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from mmseg_sats.functional.attention.class_regions import ClassRegions, Grid, find_regions
from mmseg_sats.functional.precision import full_precision, working_dtype

# A function from two tensors (..., S) to distances (...). Entries that are 0 in both must not contribute.
Measure = Callable[[Tensor, Tensor], Tensor]


class BaseAttentionMap(ABC):
    """The attention of one layer before attention dropout: L rows over S keys; each row sums to 1.

    All results are float32, or float64 if the inputs are; autocast has no effect.

    Attributes:
        query_hw: (h, w) of the query grid, L = h * w.
        key_hw: (h, w) of the key grid, S = extra_keys + h * w.
        extra_keys: how many keys come before those of the grid and have no position in the image.
    """

    query_hw: Grid
    key_hw: Grid
    extra_keys: int

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.num_heads} heads, {self.query_hw} queries over {self.key_hw} keys)'

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, L, S), the shape that ``dense`` would have."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the map is computed from, queries first."""

    @abstractmethod
    def detach(self) -> 'BaseAttentionMap':
        """The same map, detached from the graph."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Computes the rows of the query positions ``start:stop``, (B, heads, stop - start, S)."""

    @abstractmethod
    def pool_regions(self, regions: ClassRegions) -> Tensor:
        """Computes the means of ``pool`` by image and slot, (B, heads, width, S); 0 for slots without a region."""

    @abstractmethod
    def mean_row_distance(self, other: 'BaseAttentionMap', measure: Measure) -> Tensor:
        """Computes, for each row, ``measure`` of the two maps, and its mean over all rows: (B, heads)."""

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self.shape[1]

    def describe(self) -> str:
        """The kind, shape and grid as text; two maps can be compared if these are equal."""
        return f'attention {self.shape} on grid {self.query_hw}'

    def dense(self) -> Tensor:
        """The whole map, (B, heads, L, S)."""
        return self.rows(0, self.shape[2])

    def pool(self, labels: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the mean attention of each class region, eq. (1) of SATS, without building the map.

        Args:
            labels: (B, h, w) integer labels on the query grid; 0 is background.
            ignore_index: the label that belongs to no class.

        Returns:
            The means (R, heads, S), the image (R,) and the class (R,) of each region, ordered by
            image and class. R is 0 if no image has a class; even then the result is part of the graph.

        Raises:
            ValueError: if the labels are not on the query grid or are not integers.
        """
        expected = (self.shape[0], *self.query_hw)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f'labels must be on the query grid {expected}, got {tuple(labels.shape)}'
            )
        if labels.is_floating_point():
            raise ValueError(f'labels must be integers, got {labels.dtype}')
        regions = find_regions(labels, ignore_index)
        image, label, slot, _ = regions.columns
        return self.pool_regions(regions)[image, :, slot], image, label


def attend(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Computes softmax(query key^T * scale + bias), (..., P, S), from queries (..., P, d) and keys (..., S, d)."""
    with full_precision(query):
        dtype = working_dtype(query, key)
        scores = query.to(dtype) @ (key.to(dtype) * scale).mT
        return (scores if bias is None else scores + bias.to(dtype)).softmax(-1)
