# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-entropy, made large: what keeps self-training from believing its own labels too much.

Yu et al., "Self-training for Class-Incremental Semantic Segmentation", TNNLS 2022.
"""

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.models.output import SegmentorOutput


def self_entropy(logits: Tensor) -> Tensor:
    """Mean over pixels of -sum_c p_c log p_c, p = softmax of the logits, in nats.

    Args:
        logits: (B, K, H, W).

    Returns:
        A scalar in [0, log K].
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


@MODELS.register_module()
class SelfEntropyLoss(nn.Module):
    """``-loss_weight * self_entropy``: minimising it smooths the new model's predictions.

    Args:
        loss_weight: its factor.
    """

    def __init__(self, loss_weight: float = 0.1) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(
        self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor
    ) -> Tensor:
        """The loss of a batch, a scalar; the old model plays no part in it."""
        return -self.loss_weight * self_entropy(student.resized(labels.shape[-2:]))
