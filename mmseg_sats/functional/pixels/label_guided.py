# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Label-guided distillation: the labels decide whether the old background means background or a new class.

Yang et al., "Label-Guided Knowledge Distillation for Continual Semantic Segmentation on 2D Images and 3D Point
Clouds", ICCV 2023 (LGKD). MiB's distillation compares the old model's background with the sum of background and
all new classes, whatever their shares. Here every pixel has one channel for it.
"""

from functools import partial

import torch
from torch import Tensor

from mmseg_sats.functional.pixels.means import mean_over_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk


def label_guided_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    old_weight: float = 1.0,
    new_weight: float = 1.0,
    ignore_index: int = 255,
) -> Tensor:
    """-(1/K_o) mean_pixels w [q_0 log p_t + sum_{c=1}^{K_o-1} q_c log p_c].

    p is the softmax of the student's logits over all channels, q the softmax of the old model's logits. t is the
    label where it is a new class (K_o or larger), and w is ``new_weight`` there. At every other pixel, also one
    that is labelled as an old class or ignored, t is background and w is ``old_weight``.

    LGKD's paper and released code sum over channels: multiply by K_o for their weights. In the released code the
    logits are not resized (the labels are), and ignored pixels count neither in the sum nor in the divisor.

    Args:
        student_logits: (B, K, H, W), K >= K_o; the first K_o channels are those of the old model.
        teacher_logits: (B, K_o, H, W), the old model's logits, which get no gradient.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        old_weight: factor of the pixels that are not labelled as a new class, lambda_b.
        new_weight: factor of the pixels that are labelled as a new class, lambda_n.
        ignore_index: label of pixels without a label.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the sizes disagree, the student has fewer channels than the old model, or a label has no
            channel.
    """
    pixels = partial(label_guided_distillation_of_pixels, old_weight=old_weight, new_weight=new_weight)
    return mean_over_pixels(pixels, student_logits, teacher_logits, labels, ignore_index)


def label_guided_distillation_of_pixels(
    chunk: PixelChunk, old_weight: float = 1.0, new_weight: float = 1.0
) -> Tensor:
    """The loss of each pixel of a chunk, (n, w), divided by the old model's channels."""
    num_old = chunk.q.shape[1]
    new = chunk.targets >= num_old
    # Background's probability goes to this channel.
    background = chunk.log_p.gather(1, chunk.targets.masked_fill(~new, 0))[:, 0]
    old = (chunk.q[:, 1:] * chunk.log_p[:, 1:num_old]).sum(1)
    loss = torch.addcmul(old, chunk.q[:, 0], background) / -num_old
    return torch.where(new[:, 0], new_weight * loss, old_weight * loss)
