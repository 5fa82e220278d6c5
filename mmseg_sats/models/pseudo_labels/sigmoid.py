# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL's pseudo-labels: the old model's class where its sigmoid is sure."""

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.parts import PseudoLabeler
from mmseg_sats.models.resizing import logits_for_labels


@MODELS.register_module()
class SigmoidPseudoLabeler(PseudoLabeler):
    """Labels background pixels with the old model's best class where its score reaches a threshold.

    Cha et al., "SSUL", NeurIPS 2021, section 3.3. A pixel of label 0 becomes c where c, the channel
    of the largest logit, is not background and sigmoid(x_c) >= threshold. Other labels stay.

    Args:
        threshold: least score, in (0, 1].

    Raises:
        ValueError: for a threshold out of range.
    """

    pixelwise = True

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f'threshold must be in (0, 1], got {threshold}')
        self.threshold = threshold

    @torch.no_grad()
    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """The completed labels.

        Args:
            labels: (B, H, W) long.
            teacher_logits: (B, K_o, h, w), the old model's; resized where the labels' size is another.

        Returns:
            (B, H, W), of the labels' type; ``labels`` itself is not changed.

        Raises:
            ValueError: if the shapes disagree.
        """
        best, channel = logits_for_labels(labels, teacher_logits).max(1)
        sure = (channel > 0) & (best.float().sigmoid() >= self.threshold)
        return torch.where((labels == 0) & sure, channel.to(labels.dtype), labels)
