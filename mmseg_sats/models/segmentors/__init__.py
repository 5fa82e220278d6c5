# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Segmentors."""

from mmseg_sats.models.segmentors.adaptive_weight import AdaptiveWeight
from mmseg_sats.models.segmentors.incremental_encoder_decoder import IncrementalEncoderDecoder

__all__ = ['AdaptiveWeight', 'IncrementalEncoderDecoder']
