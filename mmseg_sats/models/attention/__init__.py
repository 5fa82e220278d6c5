# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-attention as a value, and the class regions that it is pooled over."""

from mmseg_sats.models.attention.attention_map import AttentionMap
from mmseg_sats.models.attention.base import BaseAttentionMap
from mmseg_sats.models.attention.window_attention_map import WindowAttentionMap
from mmseg_sats.models.attention.windows import Windows

__all__ = ['AttentionMap', 'BaseAttentionMap', 'WindowAttentionMap', 'Windows']
