# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL's pseudo-labels: the old model's class where its sigmoid is at least a threshold."""

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.parts import PseudoLabeler
from mmseg_sats.models.resizing import logits_for_labels


@MODELS.register_module()
class SigmoidPseudoLabeler(PseudoLabeler):
    """Labels background pixels with the old model's best class if its score is at least a threshold.

    Cha et al., "SSUL", NeurIPS 2021, section 3.3. Let c be the channel of the largest logit x_c at a pixel of
    label 0. The pixel's new label is c if c is not background and sigmoid(x_c) >= threshold. Other
    labels stay.

    Args:
        threshold: smallest score, in (0, 1].

    Raises:
        ValueError: the threshold is out of range.
    """

    pixelwise = True

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f'threshold must be in (0, 1], got {threshold}')
        self.threshold = threshold

    @torch.no_grad()
    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """Returns the completed labels.

        Args:
            labels: (B, H, W) long; not modified.
            teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.

        Returns:
            A new tensor like ``labels``.

        Raises:
            ValueError: the shapes disagree.
        """
        best, channel = logits_for_labels(labels, teacher_logits).max(1)
        sure = (channel > 0) & (best.float().sigmoid() >= self.threshold)
        return torch.where((labels == 0) & sure, channel.to(labels.dtype), labels)
