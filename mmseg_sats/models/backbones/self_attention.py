# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs mmseg's attention modules and returns their output and their ``AttentionMap``, for all backbones.

mmseg's modules call ``nn.MultiheadAttention.forward``, which builds the dense map and discards it. Here
``scaled_dot_product_attention`` is called with the same parameters, and the map is returned as its
projected queries and keys.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg_sats.models.attention.attention_map import AttentionMap

GridSize = tuple[int, int]

# Which of a block's layers return their attention map.
ATTENTION_LAYERS = {'last': slice(-1, None), 'all': slice(None)}


def attend_with_map(
    module: nn.MultiheadAttention,
    x: Tensor,
    hw: GridSize,
    *,
    context: Tensor | None = None,
    key_hw: GridSize | None = None,
    extra_tokens: int = 0,
) -> tuple[Tensor, AttentionMap]:
    """Computes ``module(x, context, context)`` without the dense map, and returns the map as an ``AttentionMap``.

    Args:
        module: PyTorch's attention, with one packed projection for queries, keys and values; its
            ``batch_first`` does not matter.
        x: (B, extra_tokens + L, C) tokens for the queries.
        hw: (h, w) of their grid, L = h * w.
        context: (B, S, C) tokens for the keys and values; ``x`` itself by default.
        key_hw: (h, w) of the grid of ``context``, S = h * w; required with ``context``.
        extra_tokens: how many tokens of ``x`` come before those of the grid, e.g. 1 for a class
            token. They have no position in the image and so no label: the map has no rows for them.
            They are still among the keys, since the softmax includes them.

    Returns:
        The output after the output projection (B, extra_tokens + L, C), and the map of the L
        positions before attention dropout.

    Raises:
        ValueError: if the module has separate projections, added keys or added zeros.
    """
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            'expected an nn.MultiheadAttention with one packed projection and no added keys'
            f' (kdim, vdim, add_bias_kv, add_zero_attn left alone), got {module}'
        )
    if context is None:
        (query, key, value), key_hw = _project(module, x, range(3)), hw
    else:
        (query,) = _project(module, x, range(1))
        key, value = _project(module, context, range(1, 3))
    dropout = module.dropout if module.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    attention = AttentionMap(
        query[:, :, extra_tokens:],
        key,
        module.head_dim**-0.5,
        tuple(hw),
        tuple(key_hw),
        extra_keys=extra_tokens if context is None else 0,
    )
    return module.out_proj(out.transpose(1, 2).flatten(2)), attention


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


def _project(module: nn.MultiheadAttention, x: Tensor, parts: Sequence[int]) -> Sequence[Tensor]:
    """Computes some of queries, keys and values (parts 0, 1 and 2, which must be neighbours) by one product.

    Each returned tensor is a view (B, heads, L, d) of the result.
    """
    dim = module.embed_dim
    chosen = slice(parts[0] * dim, (parts[-1] + 1) * dim)
    bias = None if module.in_proj_bias is None else module.in_proj_bias[chosen]
    packed = F.linear(x, module.in_proj_weight[chosen], bias)
    return packed.unflatten(-1, (len(parts), module.num_heads, module.head_dim)).permute(
        2, 0, 3, 1, 4
    )
