# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that what a backbone returns as attention maps is plausible: the fast part of ``check_attention``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.functional.attention.class_regions import Grid

# How many rows of a map are checked.
ROWS = 16


def check_maps(result: Any, images: Tensor) -> tuple[Sequence[Any], Sequence[BaseAttentionMap]]:
    """Checks the types, shapes, grids, and a few rows of each map.

    Args:
        result: the result of ``forward_with_attention``.
        images: (B, C, H, W), its argument.

    Returns:
        Features and maps.

    Raises:
        ValueError: something is wrong; the message names the block.
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
    """The type, shape and length of a value, as text."""
    shape = f' {tuple(value.shape)}' if isinstance(value, Tensor) else ''
    size = f' of {len(value)}' if isinstance(value, tuple | list) else ''
    return f'{type(value).__name__}{shape}{size}'


def _feature_grid(feature: Any) -> Grid | None:
    """The grid of a feature map, which may be the first item of a list (ViT with its class token)."""
    first = feature[0] if isinstance(feature, tuple | list) and feature else feature
    return tuple(first.shape[2:]) if isinstance(first, Tensor) and first.dim() == 4 else None


def _check_proportions(index: int, attention: BaseAttentionMap, grid: Grid, image: Grid) -> None:
    """Checks that a map's grid is that of the features, or finer or coarser by the same factor in both directions."""
    own = attention.query_hw
    # Patches need not be square. Then the proportions of the features differ from those of the image.
    of_the_image = not _proportional(grid, image, 0) or _proportional(own, image, 0)
    if own != grid and not (_proportional(own, grid, 1) and of_the_image):
        raise ValueError(
            f'block {index}: its grid {own} has other proportions than its features, {grid}, of images '
            f'{image}: query_hw is (height, width)'
        )


def _proportional(grid: Grid, other: Grid, slack: int) -> bool:
    """Whether two grids may come from the same image by rounding up or down; ``slack`` is 0 if ``other`` is exact."""
    bounds = [
        ((own - 1) / (side + slack), (own + 1) / max(side - slack, 1e-9))
        for own, side in zip(grid, other, strict=True)
    ]
    return max(low for low, _ in bounds) <= min(high for _, high in bounds)
