# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Vision Transformer (arXiv:2010.11929), which also returns its attention maps."""

from typing import Any

import torch
from mmseg.models.backbones import VisionTransformer
from mmseg.models.backbones.vit import TransformerEncoderLayer
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.models.backbones.self_attention import (
    ATTENTION_LAYERS,
    GridSize,
    run_layer,
    self_attention,
)
from mmseg_sats.utils.spelling import check_choice


@MODELS.register_module()
class AttentionVisionTransformer(VisionTransformer):
    """mmseg's ``VisionTransformer`` with the same parameters and features, plus its attention maps.

    A plain transformer is not divided into blocks. Here a block consists of the layers up to an index in
    ``out_indices``, so that attention maps and features have the same blocks.

    The class token has no position in the image and so no label: it is not among the queries of the maps.
    It is kept as the first key (``extra_keys`` is 1), because the softmax includes it, so that the rows
    sum to 1.

    Args:
        attention_layers: the layers whose attention ``forward_with_attention`` returns: the ``'last'``
            of each block, or ``'all'``.
        **kwargs: keyword arguments of mmseg's ``VisionTransformer``.

    Raises:
        ValueError: if ``attention_layers`` is neither of the two.
    """

    def __init__(self, *, attention_layers: str = 'last', **kwargs: Any) -> None:
        check_choice('attention_layers', attention_layers, ATTENTION_LAYERS)
        super().__init__(**kwargs)
        self.attention_layers = attention_layers

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """The same as mmseg's ``forward`` for images (B, in_channels, H, W).

        Features (B, C, h, w) of the ``out_indices``. With ``output_cls_token``, each is in a list with the
        class token (B, C); with ``out_origin``, the features of the embedding come first.
        """
        return self.forward_with_attention(x)[0]

    def forward_with_attention(
        self, x: Tensor
    ) -> tuple[tuple[Any, ...], tuple[AttentionMap, ...]]:
        """Features, and the attention maps before dropout.

        Args:
            x: (B, in_channels, H, W) images, square or not.

        Returns:
            The result of ``forward``, and the attention maps from the first layer to the last: one
            per index in ``out_indices``, or one per layer.
        """
        x, hw = self._embed(x)
        features = [self._feature(x, hw)] if self.out_origin else []
        attentions: list[AttentionMap] = []
        for index, layer in enumerate(self.layers):
            x, attention = run_layer(_layer, layer, x, hw, int(self.with_cls_token))
            if self.attention_layers == 'all' or index in self.out_indices:
                attentions.append(attention)
            if self.final_norm and index == len(self.layers) - 1:
                x = self.norm1(x)
            if index in self.out_indices:
                features.append(self._feature(x, hw))
        return tuple(features), tuple(attentions)

    def _embed(self, x: Tensor) -> tuple[Tensor, GridSize]:
        """Tokens (B, L, C) with their positions, the class token first, and the patches' grid."""
        patches, hw = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        # The position embedding has a row for the class token even if the token is not used.
        tokens = self._pos_embeding(tokens, hw, self.pos_embed)
        tokens = tokens if self.with_cls_token else tokens[:, 1:]
        return self.pre_ln(tokens) if self.pre_norm else tokens, hw

    def _feature(self, x: Tensor, hw: GridSize) -> Tensor | list[Tensor]:
        """The patches' tokens as a map (B, C, h, w)."""
        patches = x[:, 1:] if self.with_cls_token else x
        feature = patches.unflatten(1, tuple(hw)).permute(0, 3, 1, 2).contiguous()
        return [feature, x[:, 0]] if self.output_cls_token else feature


def _layer(
    layer: TransformerEncoderLayer, x: Tensor, hw: GridSize, extra_tokens: int
) -> tuple[Tensor, AttentionMap]:
    """One encoder layer on (B, extra_tokens + L, C)."""
    x, attention = self_attention(
        layer.attn, layer.norm1(x), hw, identity=x, extra_tokens=extra_tokens
    )
    return layer.ffn(layer.norm2(x), identity=x), attention
