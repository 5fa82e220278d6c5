# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MiB's unbiased cross-entropy and distillation.

Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR
2020: the cross-entropy's probabilities are eq. (5), the distillation's eq. (8).
"""

from functools import partial

import torch
from torch import Tensor

from mmseg_sats.functional.pixels.means import mean_over_labels, mean_over_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk


def unbiased_cross_entropy_of_pixels(chunk: PixelChunk, num_old: int) -> Tensor:
    """-log p of every pixel's label, (n, w); background's p includes that of all old classes."""
    own = chunk.log_p.gather(1, chunk.targets)[:, 0]
    any_old = chunk.log_p[:, :num_old].logsumexp(1)
    log_likelihood = torch.where(chunk.targets[:, 0] == 0, any_old, own)
    return -log_likelihood.masked_fill(chunk.ignored, 0)


def check_num_old(num_old: int, channels: int) -> None:
    """Raises ValueError unless 1 <= num_old <= channels."""
    if not 1 <= num_old <= channels:
        raise ValueError(f'num_old must be in 1..K (background included), got num_old={num_old} '
                         f'for logits of K={channels} channels')


def unbiased_distillation_of_pixels(chunk: PixelChunk) -> Tensor:
    """The distillation of every pixel, (n, w), divided by the old model's channels."""
    num_old = chunk.q.shape[1]
    background, old, new = chunk.log_p.split([1, num_old - 1, chunk.log_p.shape[1] - num_old], 1)
    unseen = torch.cat([background, new], 1).logsumexp(1)
    old = (chunk.q[:, 1:] * old).sum(1)
    return torch.addcmul(old, chunk.q[:, 0], unseen) / -num_old


def unbiased_cross_entropy(
    logits: Tensor, labels: Tensor, num_old: int, ignore_index: int = 255
) -> Tensor:
    """MiB's cross-entropy: label 0 may be any class of the old model (eq. (5)).

    log p(0) = lse(x[0:K_o]) - lse(x); log p(c) = x_c - lse(x) for every other label, also of an old
    class. lse is log sum exp.

    Args:
        logits: (B, K, H, W), the new model's logits at the labels' size.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        num_old: K_o, the old model's channels, background included; 1 is plain cross-entropy.
        ignore_index: label of pixels that add 0 to the sum and still count in the divisor.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the shapes disagree, ``num_old`` is not in 1..K, or a label has no channel.
    """
    check_num_old(num_old, logits.shape[1])
    pixels = partial(unbiased_cross_entropy_of_pixels, num_old=num_old)
    return mean_over_labels(pixels, logits, labels, ignore_index)


def unbiased_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """MiB's distillation: the old model's background covers background and new classes (eq. (8)).

    -(1/K_o) mean_pixels [q_0 (lse(x_0, x_new) - lse(x)) + sum_{c=1}^{K_o-1} q_c (x_c - lse(x))]
    with the student's logits x and the softmax q of the old model's logits. lse is log sum exp.

    Args:
        student_logits: (B, K, H, W), K >= K_o; the first K_o channels are those of the old model.
        teacher_logits: (B, K_o, H, W), the old model's logits, which get no gradient.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the sizes disagree, or the student has fewer channels than the old model.
    """
    return mean_over_pixels(unbiased_distillation_of_pixels, student_logits, teacher_logits)
