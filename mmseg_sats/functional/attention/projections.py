# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Attention maps of layers that are not ours: ``nn.MultiheadAttention``, and layers with one linear layer ``qkv``."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.attention.class_regions import Grid


def attend_with_map(
    module: nn.MultiheadAttention,
    x: Tensor,
    hw: Grid,
    *,
    context: Tensor | None = None,
    key_hw: Grid | None = None,
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


def map_of_qkv(qkv: Tensor, num_heads: int, hw: Grid, extra_tokens: int = 0) -> AttentionMap:
    """The map of a self-attention from its packed projection, the output of ``blocks[i].attn.qkv`` of timm's ViTs.

    Layers that normalise queries and keys after the projection need ``AttentionMap`` itself.

    Args:
        qkv: (B, extra_tokens + L, 3 * C), queries, keys and values, each by heads.
        num_heads: the number of heads, a divisor of C.
        hw: (h, w) of the grid, L = h * w.
        extra_tokens: as in :func:`attend_with_map`.

    Returns:
        The map of the L positions before attention dropout. The factor of the dot products is d ** -0.5 with
        the dimension d = C / num_heads of a head.

    Raises:
        ValueError: the last dimension is no multiple of 3 * num_heads, or the grid does not hold the tokens.
    """
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f'qkv must be (B, N, 3 * C) with C a multiple of num_heads={num_heads}, got {tuple(qkv.shape)}'
        )
    query, key, _ = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return AttentionMap(
        query[:, :, extra_tokens:], key, query.shape[3] ** -0.5, hw, hw, extra_keys=extra_tokens
    )


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
