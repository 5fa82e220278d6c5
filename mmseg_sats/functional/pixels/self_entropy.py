# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-entropy, which is maximised so that self-training does not become overconfident in its own labels.

Yu et al., "Self-training for Class-Incremental Semantic Segmentation", TNNLS 2022.
"""

from torch import Tensor

from mmseg_sats.functional.pixels.means import mean_over_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk


def self_entropy(logits: Tensor) -> Tensor:
    """Mean over pixels of -sum_c p_c log p_c, p = softmax of the logits, in nats.

    Args:
        logits: (B, K, H, W).

    Returns:
        A scalar in [0, log K].
    """
    return mean_over_pixels(self_entropy_of_pixels, logits, logits.detach())


def self_entropy_of_pixels(chunk: PixelChunk) -> Tensor:
    """The entropy of each pixel of a chunk, (n, w)."""
    return -(chunk.log_p.exp() * chunk.log_p).sum(1)
