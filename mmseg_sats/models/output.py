# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a segmentor computed for a batch, as the losses and pseudo-labellers see it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.models.attention import AttentionMap


@dataclass(eq=False)
class SegmentorOutput:
    """Outputs of one model, student or old, for a batch of B images.

    Args:
        logits: (B, K, h, w) at the head's resolution, K the model's channels, background included.
        features: one (B, C_j, h_j, w_j) per block of the backbone.
        attentions: one map per block, empty where the backbone has none.
        align_corners: how the head's logits are resized.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    attentions: tuple[AttentionMap, ...] = ()
    align_corners: bool = False
    _resized: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Logits resized bilinearly to ``size`` (H, W): (B, K, H, W), computed once per size.

        Logits that already have the size are returned themselves.
        """
        size = (int(size[0]), int(size[1]))
        if tuple(self.logits.shape[2:]) == size:
            return self.logits
        # A tensor made without a graph must not be served to a loss that wants the gradient.
        key = (size, torch.is_grad_enabled())
        if key not in self._resized:
            self._resized[key] = F.interpolate(
                self.logits, size, mode='bilinear', align_corners=self.align_corners
            )
        return self._resized[key]
