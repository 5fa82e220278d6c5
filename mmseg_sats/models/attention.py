# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Attention maps as objects that are computed on demand, and the class regions that they are pooled over."""

from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.functional.attention.window_attention_map import WindowAttentionMap
from mmseg_sats.functional.attention.windows import Windows

__all__ = ['AttentionMap', 'BaseAttentionMap', 'WindowAttentionMap', 'Windows']
