# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Twins transformers (arXiv:2104.13840), which also return the attention maps of their global layers."""

from typing import Any

from mmseg.models.backbones import PCPVT, SVT
from mmseg.models.backbones.twins import GSAEncoderLayer
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


class _TwinsWithAttention:
    """The common part of both Twins, a mixin to put before mmseg's class in the list of bases.

    In SVT, every second layer of a block attends within windows, so its attention does not cover the
    whole image. Only the maps of the global, sub-sampled layers are returned.

    Args:
        attention_layers: which global layers' maps are returned: the ``'last'`` of each block, or ``'all'``.
        **kwargs: keyword arguments of mmseg's class.

    Raises:
        ValueError: if ``attention_layers`` is neither of the two, or a block has no global layer.
    """

    def __init__(self, *, attention_layers: str = 'last', **kwargs: Any) -> None:
        check_choice('attention_layers', attention_layers, ATTENTION_LAYERS)
        super().__init__(**kwargs)
        chosen = []
        for index, layers in enumerate(self.layers):
            places = [i for i, layer in enumerate(layers) if isinstance(layer, GSAEncoderLayer)]
            if not places:
                raise ValueError(
                    f'stage {index} of {type(self).__name__} has no global layer: got '
                    f'depths={self.depths}, expected at least 2 layers in every stage'
                )
            chosen.append(places[ATTENTION_LAYERS[attention_layers]])
        self._attention_layers = chosen

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features (B, C_i, h_i, w_i) of the ``out_indices`` for images (B, in_channels, H, W)."""
        return self.forward_with_attention(x)[0]

    def forward_with_attention(
        self, x: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[AttentionMap, ...]]:
        """Features, and the attention maps before dropout.

        Args:
            x: (B, in_channels, H, W) images.

        Returns:
            The result of ``forward``, and the attention maps from the first block to the last: one per
            block, of its last global layer, or one per global layer. All blocks are included, whatever
            ``out_indices`` is.
        """
        features: list[Tensor] = []
        attentions: list[AttentionMap] = []
        for index, layers in enumerate(self.layers):
            x, hw = self.patch_embeds[index](x)
            x = self.position_encoding_drops[index](x)
            for number, layer in enumerate(layers):
                if isinstance(layer, GSAEncoderLayer):
                    x, attention = run_layer(_global_layer, layer, x, hw)
                    if number in self._attention_layers[index]:
                        attentions.append(attention)
                else:
                    x = layer(x, hw)
                if number == 0:
                    x = self.position_encodings[index](x, hw)
            if self.norm_after_stage:
                x = self.norm_list[index](x)
            x = x.unflatten(1, tuple(hw)).permute(0, 3, 1, 2).contiguous()
            if index in self.out_indices:
                features.append(x)
        return tuple(features), tuple(attentions)


@MODELS.register_module()
class AttentionPCPVT(_TwinsWithAttention, PCPVT):
    """mmseg's ``PCPVT`` with the same parameters and features, plus its attention maps. All layers are global."""


@MODELS.register_module()
class AttentionSVT(_TwinsWithAttention, SVT):
    """mmseg's ``SVT`` with the same parameters and features, plus the attention maps of its global layers."""


def _global_layer(
    layer: GSAEncoderLayer, x: Tensor, hw: GridSize
) -> tuple[Tensor, AttentionMap]:
    """One layer with global sub-sampled attention on (B, L, C)."""
    out, attention = self_attention(layer.attn, layer.norm1(x), hw, identity=0.0)
    x = x + layer.drop_path(out)
    return x + layer.drop_path(layer.ffn(layer.norm2(x))), attention
