# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-entropy, which is maximised so that self-training does not become overconfident in its own labels.

Yu et al., "Self-training for Class-Incremental Semantic Segmentation", TNNLS 2022.
"""

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.pixel_losses.base import PixelwiseDistillationLoss, mean_over_pixels
from mmseg_sats.models.pixel_losses.per_pixel import PixelChunk


def self_entropy(logits: Tensor) -> Tensor:
    """Mean over pixels of -sum_c p_c log p_c, p = softmax of the logits, in nats.

    Args:
        logits: (B, K, H, W).

    Returns:
        A scalar in [0, log K].
    """
    return mean_over_pixels(_entropy, logits, logits.detach())


def _entropy(chunk: PixelChunk) -> Tensor:
    return -(chunk.log_p.exp() * chunk.log_p).sum(1)


@MODELS.register_module()
class SelfEntropyLoss(PixelwiseDistillationLoss):
    """``-loss_weight * self_entropy``: minimising it makes the new model's predictions less confident.

    The old model's output is not used.

    Args:
        loss_weight: factor of the loss.
    """

    def __init__(self, loss_weight: float = 0.1) -> None:
        super().__init__(loss_weight)

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """Minus the entropy of each pixel of a chunk, (n, w)."""
        return -_entropy(chunk)
