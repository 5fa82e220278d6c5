# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs mmseg's attention modules and returns their output and their ``AttentionMap``, for all backbones.

mmseg's modules call ``nn.MultiheadAttention.forward``, which builds the dense map and discards it. Here
``scaled_dot_product_attention`` is called with the same parameters, and the map is returned as its
projected queries and keys.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.attention.projections import attend_with_map

GridSize = tuple[int, int]

# Which of a block's layers return their attention map.
ATTENTION_LAYERS = {'last': slice(-1, None), 'all': slice(None)}


def self_attention(
    module: MultiheadAttention,
    x: Tensor,
    hw: GridSize,
    *,
    identity: Tensor | float,
    extra_tokens: int = 0,
) -> tuple[Tensor, AttentionMap]:
    """Computes mmcv's ``MultiheadAttention``, or mmseg's with spatial reduction, and its attention map.

    Args:
        module: ViT's ``MultiheadAttention``, MiT's ``EfficientMultiheadAttention``, Twins'
            ``GlobalSubsampledAttention``.
        x: (B, extra_tokens + L, C) normalised tokens.
        hw: (h, w) of the grid, L = h * w.
        identity: the residual connection.
        extra_tokens: as in :func:`attend_with_map`.

    Returns:
        The result of ``module(x, identity=identity)``, and the map.
    """
    context, key_hw = None, None
    if getattr(module, 'sr_ratio', 1) > 1:
        reduced, key_hw = reduce_tokens(module.sr, x, hw)
        context = module.norm(reduced)
    out, attention = attend_with_map(
        module.attn, x, hw, context=context, key_hw=key_hw, extra_tokens=extra_tokens
    )
    return identity + module.dropout_layer(module.proj_drop(out)), attention


def reduce_tokens(conv: nn.Conv2d, x: Tensor, hw: GridSize) -> tuple[Tensor, GridSize]:
    """The spatial reduction of tokens: a convolution with stride = kernel size, computed as a linear layer.

    Args:
        conv: from C to D channels, kernel and stride (r, r), without padding.
        x: (B, L, C) tokens.
        hw: (h, w) of their grid, L = h * w. If r does not divide h or w, the remaining rows or columns are
            dropped, as the convolution does.

    Returns:
        (B, (h // r) * (w // r), D) tokens, and their grid (h // r, w // r).

    Raises:
        ValueError: if the grid is smaller than the kernel.
    """
    ratio = conv.kernel_size[0]
    height, width = hw[0] // ratio, hw[1] // ratio
    if not height or not width:
        raise ValueError(
            f'the spatial reduction by {ratio} needs a grid of {ratio} x {ratio} tokens at least, '
            f'got {hw[0]} x {hw[1]}: the image is too small'
        )
    image = x.unflatten(1, tuple(hw))[:, : height * ratio, : width * ratio]
    cells = image.unflatten(2, (width, ratio)).unflatten(1, (height, ratio)).transpose(2, 3)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(cells.flatten(3).flatten(1, 2), weight, conv.bias), (height, width)


def run_layer(
    step: Callable[..., tuple[Tensor, AttentionMap]], layer: nn.Module, x: Tensor, *args: Any
) -> tuple[Tensor, AttentionMap]:
    """Computes ``step(layer, x, *args)``; it is recomputed in the backward pass if the layer's ``with_cp`` is set."""
    if getattr(layer, 'with_cp', False) and x.requires_grad:
        return checkpoint(step, layer, x, *args, use_reentrant=False)
    return step(layer, x, *args)
