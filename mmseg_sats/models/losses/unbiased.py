# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MiB's unbiased cross-entropy and distillation.

Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR
2020: the cross-entropy's probabilities are eq. (5), the distillation's eq. (8).
"""

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.pixel_losses.base import (
    PixelwiseDistillationLoss,
    PixelwiseSegmentationLoss,
    mean_over_pixels,
)
from mmseg_sats.models.pixel_losses.per_pixel import PixelChunk


def _cross_entropy_of_pixels(chunk: PixelChunk, num_old: int) -> Tensor:
    """-log p of every pixel's label, (n, w); background's p includes that of all old classes."""
    own = chunk.log_p.gather(1, chunk.targets)[:, 0]
    any_old = chunk.log_p[:, :num_old].logsumexp(1)
    log_likelihood = torch.where(chunk.targets[:, 0] == 0, any_old, own)
    return -log_likelihood.masked_fill(chunk.ignored, 0)


def _check_num_old(num_old: int, channels: int) -> None:
    if not 1 <= num_old <= channels:
        raise ValueError(f'num_old must be in 1..K (background included), got num_old={num_old} '
                         f'for logits of K={channels} channels')


def _distillation_of_pixels(chunk: PixelChunk) -> Tensor:
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
    _check_num_old(num_old, logits.shape[1])
    return UnbiasedCrossEntropyLoss(num_old)(logits, labels, ignore_index=ignore_index)


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
    return mean_over_pixels(_distillation_of_pixels, student_logits, teacher_logits)


@MODELS.register_module()
class UnbiasedCrossEntropyLoss(PixelwiseSegmentationLoss):
    """:func:`unbiased_cross_entropy` as the ``loss_decode`` of an mmseg head.

    Only label 0 may be any old class. If a pixel is labelled as an old class (in the ``sequential``
    setting, in exemplars, by pseudo-labels), its loss is plain cross-entropy. MiB's released code first
    turns such labels into background, so that they mean no more than "some old class". Without such
    labels, in ``overlapped`` and ``disjoint``, both are the same.

    Args:
        num_old: K_o, the old model's channels, background included.
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.

    Raises:
        ValueError: ``num_old`` is less than 1.
    """

    def __init__(self, num_old: int, loss_weight: float = 1.0, loss_name: str = 'loss_ce') -> None:
        super().__init__(loss_weight, loss_name)
        if num_old < 1:
            raise ValueError(f'num_old counts the background and must be at least 1, got {num_old}')
        self.num_old = num_old

    def check(self, channels: int) -> None:
        """Raises ValueError if there are fewer channels than those of the old model."""
        _check_num_old(self.num_old, channels)

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w), 0 for ignored pixels."""
        return _cross_entropy_of_pixels(chunk, self.num_old)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'num_old={self.num_old}, {super().extra_repr()}'


@MODELS.register_module()
class UnbiasedDistillationLoss(PixelwiseDistillationLoss):
    """:func:`unbiased_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 10 published, 100 for VOC 15-1, 40 in the SATS comparison,
            20 as SATS's lambda_d.
    """

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""
        return _distillation_of_pixels(chunk)
