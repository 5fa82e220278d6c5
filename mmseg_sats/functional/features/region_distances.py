# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Distances between two models' attention maps or features of one block, region by region; eq. (1) of SATS.

Qiu et al., *SATS: Self-Attention Transfer for continual semantic Segmentation* (Pattern Recognition 2023).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mmseg_sats.functional.attention.base import BaseAttentionMap, Measure
from mmseg_sats.functional.attention.class_regions import ClassRegions, Grid, find_regions_on_grids
from mmseg_sats.functional.precision import working_dtype

Block = BaseAttentionMap | Tensor


def _squared_l2(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).square().sum(-1)


def _l2(new: Tensor, old: Tensor) -> Tensor:
    # The derivative of vector_norm at 0 is 0, where sqrt(sum of squares) would give NaN.
    return torch.linalg.vector_norm(new - old, dim=-1)


def _cosine(new: Tensor, old: Tensor) -> Tensor:
    # 1 - cos of two directions, without cancellation where they are close. It is 0 for two zero vectors, which
    # stand for regions that an image does not have.
    return _squared_l2(_direction(new), _direction(old)) / 2


def _direction(vector: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return vector / torch.where(length > 0, length, 1)


DISTANCES: dict[str, Measure] = {'l2': _l2, 'squared_l2': _squared_l2, 'cosine': _cosine}


def grid_of(block: Block) -> Grid:
    """(h, w) of a block: its query grid, or that of its features (B, C, h, w)."""
    if isinstance(block, BaseAttentionMap):
        return block.query_hw
    if block.ndim != 4:
        raise ValueError(f'features must be (B, C, h, w), got {tuple(block.shape)}')
    return tuple(block.shape[2:])


class BlockDistances(NamedTuple):
    """The distances of one block.

    Args:
        values: (B, heads, n), where n is the largest number of regions of an image; 0 for images with
            fewer regions.
        presence: (B, K), on the CPU, which of K labels each image has.
    """

    values: Tensor
    presence: Tensor


class LabelGrids:
    """The class regions of a batch of labels on the blocks' grids, found once for all of them."""

    def __init__(
        self, labels: Tensor, ignore_index: int, num_labels: int | None, grids: Sequence[Grid]
    ) -> None:
        self.labels, self.ignore_index, self.num_labels = labels, ignore_index, num_labels
        self._grids = grids

    @cached_property
    def by_class(self) -> dict[Grid, ClassRegions]:
        """The regions of the labels, resized to each grid by nearest neighbour."""
        return find_regions_on_grids(self.labels, self._grids, self.ignore_index, self.num_labels)

    @cached_property
    def whole(self) -> dict[Grid, ClassRegions]:
        """All positions as one region, whatever their labels."""
        everything = torch.ones_like(self.labels)
        return find_regions_on_grids(everything, self._grids, ignore_index=-1, num_labels=2)


def _class_distances(
    student: Block, teacher: Block, grids: LabelGrids, distance: Measure
) -> BlockDistances:
    return _region_distances(student, teacher, grids.by_class[grid_of(student)], distance)


def _global_distances(
    student: Block, teacher: Block, grids: LabelGrids, distance: Measure
) -> BlockDistances:
    return _region_distances(student, teacher, grids.whole[grid_of(student)], distance)


def _region_distances(
    student: Block, teacher: Block, regions: ClassRegions, distance: Measure
) -> BlockDistances:
    with torch.no_grad():
        old = _region_means(teacher, regions)
    return BlockDistances(distance(_region_means(student, regions), old), regions.presence)


def _region_means(block: Block, regions: ClassRegions) -> Tensor:
    """Eq. (1): (B, heads, width, S) of an attention map, (B, 1, width, C) of features (B, C, h, w)."""
    if isinstance(block, BaseAttentionMap):
        return block.pool_regions(regions)
    features = block.flatten(2).to(working_dtype(block)).mT
    # Padding rows have weight 0. They are set to 0 too, in case background is not finite: 0 * inf is NaN.
    rows = features.flatten(0, 1)[regions.positions].masked_fill(regions.pads.unsqueeze(2), 0)
    return (regions.weights(rows.dtype) @ rows).unsqueeze(1)


def _position_distances(
    student: Block, teacher: Block, grids: LabelGrids, distance: Measure
) -> BlockDistances:
    """No pooling: the mean distance over all positions; attention rows are computed in chunks."""
    if isinstance(student, BaseAttentionMap):
        values = student.mean_row_distance(teacher.detach(), distance)
    else:
        dtype = working_dtype(student, teacher)
        new, old = (features.to(dtype).flatten(2).mT for features in (student, teacher.detach()))
        values = distance(new, old).mean(1, keepdim=True)
    return BlockDistances(values.unsqueeze(2), torch.ones(len(values), 1, dtype=torch.bool))


POOLINGS = {'class': _class_distances, 'global': _global_distances, 'none': _position_distances}
