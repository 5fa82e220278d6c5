# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL's pseudo-labels: the old model's class where its sigmoid is at least a threshold.

Cha et al., "SSUL", NeurIPS 2021, section 3.3.
"""

import torch
from torch import Tensor

from mmseg_sats.functional.best_channel import best_channel
from mmseg_sats.functional.resizing import logits_for_labels


@torch.no_grad()
def sigmoid_labels(labels: Tensor, teacher_logits: Tensor, threshold: float = 0.7) -> Tensor:
    """Labels background pixels with the old model's best class if its score is at least a threshold.

    Let c be the channel of the largest logit x_c at a pixel of label 0. The pixel's new label is c if c is not
    background and sigmoid(x_c) >= threshold. Other labels stay.

    Args:
        labels: (B, H, W) long; not modified.
        teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.
        threshold: smallest score.

    Returns:
        A new tensor like ``labels``.

    Raises:
        ValueError: the shapes disagree.
    """
    best, channel = best_channel(logits_for_labels(labels, teacher_logits))
    sure = (channel > 0) & (best.float().sigmoid() >= threshold)
    return torch.where((labels == 0) & sure, channel.to(labels.dtype), labels)
