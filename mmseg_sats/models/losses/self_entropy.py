# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-entropy, made large: what keeps self-training from believing its own labels too much.

Yu et al., "Self-training for Class-Incremental Semantic Segmentation", TNNLS 2022.
"""

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.pixel_losses.base import LogitsDistillation, mean_over_pixels
from mmseg_sats.models.pixel_losses.pixels import Pixels


def self_entropy(logits: Tensor) -> Tensor:
    """Mean over pixels of -sum_c p_c log p_c, p = softmax of the logits, in nats.

    Args:
        logits: (B, K, H, W).

    Returns:
        A scalar in [0, log K].
    """
    return mean_over_pixels(_entropy, logits, logits.detach())


def _entropy(pixels: Pixels) -> Tensor:
    return -(pixels.log_p.exp() * pixels.log_p).sum(1)


@MODELS.register_module()
class SelfEntropyLoss(LogitsDistillation):
    """``-loss_weight * self_entropy``: minimising it smooths the new model's predictions.

    The old model plays no part in it.

    Args:
        loss_weight: its factor.
    """

    def __init__(self, loss_weight: float = 0.1) -> None:
        super().__init__(loss_weight)

    def pixels(self, pixels: Pixels) -> Tensor:
        """Minus the entropy of each pixel of a piece, (n, w)."""
        return -_entropy(pixels)
