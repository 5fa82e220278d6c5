# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses that are means over pixels, computed together without a tensor of all pixels and channels."""

from mmseg_sats.functional.pixels.per_pixel import PixelChunk, per_pixel_losses
from mmseg_sats.models.pixel_losses.base import (
    PixelwiseDistillationLoss,
    PixelwiseSegmentationLoss,
)

__all__ = [
    'PixelChunk',
    'PixelwiseDistillationLoss',
    'PixelwiseSegmentationLoss',
    'per_pixel_losses',
]
