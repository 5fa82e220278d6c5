# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmseg's transformer backbones, which also return their attention maps."""

from mmseg_sats.models.backbones.attention_mit import AttentionMixVisionTransformer
from mmseg_sats.models.backbones.attention_swin import AttentionSwinTransformer
from mmseg_sats.models.backbones.attention_twins import AttentionPCPVT, AttentionSVT
from mmseg_sats.models.backbones.attention_vit import AttentionVisionTransformer
from mmseg_sats.models.backbones.check_attention import check_attention
from mmseg_sats.models.backbones.self_attention import attend_with_map, self_attention

__all__ = [
    'AttentionMixVisionTransformer',
    'AttentionPCPVT',
    'AttentionSVT',
    'AttentionSwinTransformer',
    'AttentionVisionTransformer',
    'attend_with_map',
    'check_attention',
    'self_attention',
]
