# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL's segmentation loss: a binary cross-entropy for each channel.

Cha et al., "SSUL", NeurIPS 2021, section 3.3. Unlike with a softmax, training a new class does not affect the
probabilities of the frozen classes.
"""

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.losses.sigmoid import SigmoidCrossEntropyLoss, sigmoid_cross_entropy


def one_vs_rest(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """The mean of -log s(x_y) - sum_{c != y} log(1 - s(x_c)) over all pixels with a label y; s is the sigmoid.

    This is :func:`sigmoid_cross_entropy`, but ignored pixels do not count in the divisor, as in SSUL's
    released code.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        ignore_index: label of pixels that are left out of the sum and the divisor.

    Returns:
        A scalar of at least float32; 0 if all pixels are ignored.

    Raises:
        ValueError: the shapes disagree or a label has no channel.
    """
    mean = sigmoid_cross_entropy(logits, labels, ignore_index)
    return mean * labels.numel() / _number_of_labelled(labels, ignore_index)


def _number_of_labelled(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels != ignore_index).sum().clamp(min=1)


@MODELS.register_module()
class OneVsRestLoss(SigmoidCrossEntropyLoss):
    """:func:`one_vs_rest` as the ``loss_decode`` of an mmseg head.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
    """

    avg_non_ignore = True  # mmseg's name for a mean over the pixels that are not ignored

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_bce') -> None:
        super().__init__(loss_weight, loss_name)

    def divisor(self, label: Tensor, ignore_index: int) -> Tensor:
        """The number of pixels that are not ignored, at least 1."""
        return _number_of_labelled(label, ignore_index)
