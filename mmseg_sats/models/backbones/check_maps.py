# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Whether what a backbone hands out as its attention can be that: the cheap part of ``check_attention``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmseg_sats.models.attention.base import BaseAttentionMap
from mmseg_sats.models.attention.class_regions import Grid

# How many rows of a map are looked at.
ROWS = 16


def check_maps(result: Any, images: Tensor) -> tuple[Sequence[Any], Sequence[BaseAttentionMap]]:
    """Looks at kinds, shapes, grids, and a few rows of each map.

    Args:
        result: what ``forward_with_attention`` returned.
        images: (B, C, H, W), of what.

    Returns:
        Features and maps.

    Raises:
        ValueError: something is not as it must be, named with its block.
    """
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(
            f'forward_with_attention must return (features, attentions), got {_kind(result)}'
        )
    features, maps = result
    if not isinstance(maps, tuple | list) or not maps:
        raise ValueError(
            f'attentions must be a tuple of attention maps, one for each block, got {_kind(maps)}'
        )
    grids = [_feature_grid(feature) for feature in features]
    for index, attention in enumerate(maps):
        if not isinstance(attention, BaseAttentionMap):
            raise ValueError(
                f'block {index}: expected an AttentionMap (or WindowAttentionMap), got {_kind(attention)}'
            )
        if attention.shape[0] != len(images):
            raise ValueError(
                f'block {index}: expected a map of {len(images)} images, got {attention.describe()}: '
                'queries are (B, heads, L, d), the heads apart from the images'
            )
        if len(grids) == len(maps) and grids[index]:
            _check_proportions(index, attention, grids[index], tuple(images.shape[2:]))
        rows = attention.rows(0, min(ROWS, attention.shape[2]))
        if not rows.isfinite().all():
            raise ValueError(f'block {index}: its map is not finite')
        if not torch.allclose(rows.sum(-1), rows.new_ones(()), atol=1e-3):
            raise ValueError(f'block {index}: the rows of its map do not sum to 1')
    return features, maps


def _kind(value: Any) -> str:
    """What it is, in a few words."""
    shape = f' {tuple(value.shape)}' if isinstance(value, Tensor) else ''
    size = f' of {len(value)}' if isinstance(value, tuple | list) else ''
    return f'{type(value).__name__}{shape}{size}'


def _feature_grid(feature: Any) -> Grid | None:
    """The grid of a feature map, which may stand first in a list (ViT with its class token)."""
    first = feature[0] if isinstance(feature, tuple | list) and feature else feature
    return tuple(first.shape[2:]) if isinstance(first, Tensor) and first.dim() == 4 else None


def _check_proportions(index: int, attention: BaseAttentionMap, grid: Grid, image: Grid) -> None:
    """A map's grid may be finer or coarser than the features', by the same factor in height and width."""
    own = attention.query_hw
    # Patches that are no squares are legal, and show in the features.
    of_the_image = not _proportional(grid, image, 0) or _proportional(own, image, 0)
    if own != grid and not (_proportional(own, grid, 1) and of_the_image):
        raise ValueError(
            f'block {index}: its grid {own} has other proportions than its features, {grid}, of images '
            f'{image}: query_hw is (height, width)'
        )


def _proportional(grid: Grid, other: Grid, slack: int) -> bool:
    """Whether two grids may be roundings, up or down, of the same image; ``slack`` is 0 where the other is exact."""
    bounds = [
        ((own - 1) / (side + slack), (own + 1) / max(side - slack, 1e-9))
        for own, side in zip(grid, other, strict=True)
    ]
    return max(low for low, _ in bounds) <= min(high for _, high in bounds)
