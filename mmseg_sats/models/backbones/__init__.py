# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Backbones that name their queries and keys."""

from mmseg_sats.models.backbones.attention_mit import AttentionMixVisionTransformer

__all__ = ['AttentionMixVisionTransformer']
