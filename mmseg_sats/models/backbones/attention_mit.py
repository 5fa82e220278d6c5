# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Mix Transformer of SegFormer (arXiv:2105.15203), which also returns its attention maps."""

from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.backbones.mit import MixFFN, TransformerEncoderLayer
from mmseg.models.utils import nlc_to_nchw
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.models.backbones.gelu_linear import gelu_linear
from mmseg_sats.models.backbones.self_attention import (
    ATTENTION_LAYERS,
    GridSize,
    run_layer,
    self_attention,
)
from mmseg_sats.utils.spelling import check_choice


@MODELS.register_module()
class AttentionMixVisionTransformer(MixVisionTransformer):
    """mmseg's ``MixVisionTransformer`` with the same parameters and features, plus its attention maps.

    Args:
        attention_layers: the layers whose attention ``forward_with_attention`` returns: the ``'last'``
            of each block, or ``'all'``.
        *args: positional arguments of mmseg's ``MixVisionTransformer``.
        **kwargs: keyword arguments of mmseg's ``MixVisionTransformer``.

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
        """Features, and the attention maps before dropout.

        Args:
            x: (B, in_channels, H, W) images.

        Returns:
            The result of ``forward``, and the attention maps from the first block to the last: one per
            block, of its last layer, or one per layer. All blocks are included, whatever
            ``out_indices`` is.
        """
        features: list[Tensor] = []
        attentions: list[AttentionMap] = []
        # With channels-last images, all later feature maps are channels-last too, so that tokens are views of
        # them and norms read contiguous memory.
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
    """Computes ``module(x, hw, identity=identity)`` without changing the layout of the tokens.

    The 1 x 1 convolutions are computed as linear layers. For the depth-wise convolution, the tokens are
    viewed as a channels-last image and its result as tokens, without copies, so that activation and
    dropout read contiguous memory.

    Args:
        module: SegFormer's feed-forward layer.
        x: (B, L, C) normalised tokens.
        hw: (h, w) of their grid, L = h * w.
        identity: (B, L, C), the residual connection.

    Returns:
        (B, L, C)
    """
    widen, depthwise, activate, drop, narrow, drop_out = module.layers
    hidden = F.linear(x, widen.weight.flatten(1), widen.bias)
    hidden = depthwise(hidden.unflatten(1, tuple(hw)).permute(0, 3, 1, 2))
    hidden = hidden.permute(0, 2, 3, 1).flatten(1, 2)
    weight = narrow.weight.flatten(1)
    if type(activate) is nn.GELU and not (drop.training and drop.p):
        out = gelu_linear(hidden, weight, narrow.bias, activate.approximate)
    else:
        out = F.linear(drop(activate(hidden)), weight, narrow.bias)
    return identity + module.dropout_layer(drop_out(out))
