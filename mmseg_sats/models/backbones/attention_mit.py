# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Mix Transformer of SegFormer (arXiv:2105.15203), handing out its self-attention too."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.backbones.mit import EfficientMultiheadAttention, TransformerEncoderLayer
from mmseg.models.utils import nchw_to_nlc, nlc_to_nchw
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg_sats.models.attention import AttentionMap
from mmseg_sats.suggest import check_choice

GridSize = tuple[int, int]

# How many of a stage's layers, counted from its end, hand out their attention; None: all of them.
ATTENTION_LAYERS = {'last': 1, 'all': None}


@MODELS.register_module()
class AttentionMixVisionTransformer(MixVisionTransformer):
    """mmseg's ``MixVisionTransformer``, same parameters and features, plus its attention.

    The stock attention goes through ``nn.MultiheadAttention``, which builds the dense map and
    throws it away. Here the same parameters feed ``scaled_dot_product_attention``, and the
    projected queries and keys are what is handed out.

    Args:
        attention_layers: which layers' attention ``forward_with_attention`` returns: ``'last'`` of
            each stage, or ``'all'``.
        **kwargs: the arguments of mmseg's ``MixVisionTransformer``.

    Raises:
        ValueError: if ``attention_layers`` is neither of the two.
    """

    def __init__(self, *, attention_layers: str = 'last', **kwargs: Any) -> None:
        check_choice('attention_layers', attention_layers, ATTENTION_LAYERS)
        super().__init__(**kwargs)
        self.attention_layers = attention_layers

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features (B, C_i, h_i, w_i) of the ``out_indices`` for images (B, in_channels, H, W)."""
        return self.forward_with_attention(x)[0]

    def forward_with_attention(self, x: Tensor) -> tuple[list[Tensor], tuple[AttentionMap, ...]]:
        """Features, and the attention before dropout.

        Args:
            x: (B, in_channels, H, W) images.

        Returns:
            What ``forward`` returns, and the attention maps from the first stage to the last: one
            per stage, of its last layer, or one per layer. All stages are there, whatever
            ``out_indices`` is.
        """
        features: list[Tensor] = []
        attentions: list[AttentionMap] = []
        for index, (patch_embed, blocks, norm) in enumerate(self.layers):
            x, hw = patch_embed(x)
            first = len(blocks) - (ATTENTION_LAYERS[self.attention_layers] or len(blocks))
            for number, block in enumerate(blocks):
                x, attention = _run_block(block, x, hw)
                if number >= first:
                    attentions.append(attention)
            x = nlc_to_nchw(norm(x), hw)
            if index in self.out_indices:
                features.append(x)
        return features, tuple(attentions)


def _run_block(
    block: TransformerEncoderLayer, x: Tensor, hw: GridSize
) -> tuple[Tensor, AttentionMap]:
    """One encoder layer on (B, L, C), recomputed in backward where it asks so (``with_cp``)."""
    if block.with_cp and x.requires_grad:
        return checkpoint(_block, block, x, hw, use_reentrant=False)
    return _block(block, x, hw)


def _block(block: TransformerEncoderLayer, x: Tensor, hw: GridSize) -> tuple[Tensor, AttentionMap]:
    x, attention = _attend(block.attn, block.norm1(x), hw, identity=x)
    return block.ffn(block.norm2(x), hw, identity=x), attention


def _attend(
    module: EfficientMultiheadAttention, x: Tensor, hw: GridSize, identity: Tensor
) -> tuple[Tensor, AttentionMap]:
    """The module's attention on (B, L, C) with its residual, and its map."""
    stock = module.attn
    query, key, value, key_hw = _project(module, x, hw)
    dropout = stock.dropout if stock.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    out = stock.out_proj(out.transpose(1, 2).flatten(2))
    attention = AttentionMap(query, key, stock.head_dim**-0.5, tuple(hw), key_hw)
    return identity + module.dropout_layer(module.proj_drop(out)), attention


def _project(
    module: EfficientMultiheadAttention, x: Tensor, hw: GridSize
) -> tuple[Tensor, Tensor, Tensor, GridSize]:
    """Queries (B, heads, L, d), keys and values (B, heads, S, d), keys' grid."""
    stock = module.attn
    if module.sr_ratio == 1:
        (query, key, value), key_hw = _linear(stock, x, range(3)), hw
    else:
        reduced = module.sr(nlc_to_nchw(x, hw))
        key_hw = reduced.shape[2:]
        (query,) = _linear(stock, x, range(1))
        key, value = _linear(stock, module.norm(nchw_to_nlc(reduced)), range(1, 3))
    return query, key, value, tuple(key_hw)


def _linear(stock: nn.MultiheadAttention, x: Tensor, parts: Sequence[int]) -> Sequence[Tensor]:
    """The given neighbouring parts (0 query, 1 key, 2 value) of the packed projection.

    One product gives all the parts, and each is a view (B, heads, L, d) into it.
    """
    dim = stock.embed_dim
    chosen = slice(parts[0] * dim, (parts[-1] + 1) * dim)
    bias = None if stock.in_proj_bias is None else stock.in_proj_bias[chosen]
    packed = F.linear(x, stock.in_proj_weight[chosen], bias)
    return packed.unflatten(-1, (len(parts), stock.num_heads, stock.head_dim)).permute(
        2, 0, 3, 1, 4
    )
