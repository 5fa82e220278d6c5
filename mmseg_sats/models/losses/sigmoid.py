# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""LwF-MC: every channel is a separate binary classifier with a sigmoid.

This is the multi-class Learning without Forgetting that Rebuffi et al., "iCaRL", CVPR 2017, compare with
(iCaRL's loss without its exemplars and its classifier), applied to pixels as in the released code of MiB.
There the old channels are trained with the labels and with the old model's sigmoids.
"""

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.pixel_losses.base import (
    PixelwiseDistillationLoss,
    PixelwiseSegmentationLoss,
    mean_over_pixels,
)
from mmseg_sats.models.pixel_losses.per_pixel import PixelChunk


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Binary cross-entropy of all channels against one-hot labels, summed over the channels.

    Args:
        logits: (B, K, H, W), the new model's logits at the labels' size.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        ignore_index: label of pixels that add 0 to the sum and still count in the divisor.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the shapes disagree or a label has no channel.
    """
    return SigmoidCrossEntropyLoss()(logits, labels, ignore_index=ignore_index)


def _against_one_hot(chunk: PixelChunk) -> Tensor:
    one_hot = torch.zeros_like(chunk.student).scatter_(1, chunk.targets, 1)
    loss = F.binary_cross_entropy_with_logits(chunk.student, one_hot, reduction='none').sum(1)
    return loss.masked_fill(chunk.ignored, 0)


def sigmoid_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """K_o mean BCE(x[0:K_o], the old model's sigmoids): a mean over pixels, a sum over old channels.

    Args:
        student_logits: (B, K, H, W), K >= K_o; the first K_o channels are those of the old model.
        teacher_logits: (B, K_o, H, W), the old model's logits, which get no gradient.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the sizes disagree, or the student has fewer channels than the old model.
    """
    return mean_over_pixels(_against_sigmoids, student_logits, teacher_logits)


def _against_sigmoids(chunk: PixelChunk) -> Tensor:
    x, old = chunk.student[:, : chunk.teacher.shape[1]], chunk.teacher.sigmoid()
    return F.binary_cross_entropy_with_logits(x, old, reduction='none').sum(1)


@MODELS.register_module()
class SigmoidCrossEntropyLoss(PixelwiseSegmentationLoss):
    """:func:`sigmoid_cross_entropy` as the ``loss_decode`` of an mmseg head.

    The sigmoid keeps the order of the logits, so mmseg's prediction, their argmax, is right for it.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
    """

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w), 0 for ignored pixels."""
        return _against_one_hot(chunk)


@MODELS.register_module()
class SigmoidDistillationLoss(PixelwiseDistillationLoss):
    """:func:`sigmoid_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 10 published for LwF-MC.
    """

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""
        return _against_sigmoids(chunk)
