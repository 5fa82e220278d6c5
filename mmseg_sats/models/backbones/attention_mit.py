# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Mix Transformer of SegFormer (arXiv:2105.15203), handing out its self-attention too."""

from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.backbones.mit import MixFFN, TransformerEncoderLayer
from mmseg.models.utils import nlc_to_nchw
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.attention.attention_map import AttentionMap
from mmseg_sats.models.backbones.self_attention import (
    ATTENTION_LAYERS,
    GridSize,
    run_layer,
    self_attention,
)
from mmseg_sats.utils.spelling import check_choice


@MODELS.register_module()
class AttentionMixVisionTransformer(MixVisionTransformer):
    """mmseg's ``MixVisionTransformer``, same parameters and features, plus its attention.

    Args:
        attention_layers: which layers' attention ``forward_with_attention`` returns: ``'last'`` of
            each stage, or ``'all'``.
        *args: the arguments of mmseg's ``MixVisionTransformer`` by place.
        **kwargs: the arguments of mmseg's ``MixVisionTransformer``.

    Raises:
        ValueError: if ``attention_layers`` is neither of the two.
    """

    def __init__(self, *args: Any, attention_layers: str = 'last', **kwargs: Any) -> None:
        check_choice('attention_layers', attention_layers, ATTENTION_LAYERS)
        super().__init__(*args, **kwargs)
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
        # Everything behind is channels last and so a view of tokens; a convolution of an image in
        # another layout would hand its own on, and the norm behind it would walk across.
        x = x.contiguous(memory_format=torch.channels_last)
        for index, (patch_embed, blocks, norm) in enumerate(self.layers):
            x, hw = patch_embed(x)
            chosen = range(len(blocks))[ATTENTION_LAYERS[self.attention_layers]]
            for number, block in enumerate(blocks):
                x, attention = run_layer(_layer, block, x, hw)
                if number in chosen:
                    attentions.append(attention)
            x = nlc_to_nchw(norm(x), hw)
            if index in self.out_indices:
                features.append(x)
        return features, tuple(attentions)


def _layer(
    layer: TransformerEncoderLayer, x: Tensor, hw: GridSize
) -> tuple[Tensor, AttentionMap]:
    """One encoder layer on (B, L, C)."""
    x, attention = self_attention(layer.attn, layer.norm1(x), hw, identity=x)
    return mix_ffn(layer.ffn, layer.norm2(x), hw, identity=x), attention


def mix_ffn(module: MixFFN, x: Tensor, hw: GridSize, *, identity: Tensor) -> Tensor:
    """``module(x, hw, identity=identity)`` on tokens throughout.

    The 1 x 1 convolutions are products with the tokens. The depth-wise one sees the tokens as a
    channels-last image, which is a view both ways, so that the activation and dropout run over
    memory in order.

    Args:
        module: SegFormer's feed-forward layer.
        x: (B, L, C) normalised tokens.
        hw: (h, w) of their grid, L = h * w.
        identity: (B, L, C), what the residual connection adds.

    Returns:
        (B, L, C)
    """
    widen, depthwise, activate, drop, narrow, drop_out = module.layers
    hidden = F.linear(x, widen.weight.flatten(1), widen.bias)
    hidden = depthwise(hidden.unflatten(1, tuple(hw)).permute(0, 3, 1, 2))
    hidden = drop(activate(hidden.permute(0, 2, 3, 1).flatten(1, 2)))
    out = F.linear(hidden, narrow.weight.flatten(1), narrow.bias)
    return identity + module.dropout_layer(drop_out(out))
