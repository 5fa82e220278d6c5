# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-attention as a value, and the class regions that it is pooled over."""

from mmseg_sats.models.attention.attention_map import AttentionMap

__all__ = ['AttentionMap']
