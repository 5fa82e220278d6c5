# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A sigmoid for each class, one against the rest: SSUL's segmentation loss.

Cha et al., "SSUL", NeurIPS 2021, section 3.3: binary cross-entropy, so that a new class's row does not
push the scores of frozen rows, as a softmax would.
"""

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.losses.sigmoid import SigmoidCrossEntropyLoss, sigmoid_cross_entropy


def one_vs_rest(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """-log s(x_y) - sum_{c != y} log(1 - s(x_c)), s the sigmoid, y the label: the mean over labelled pixels.

    :func:`sigmoid_cross_entropy`, but for the divisor, in which ignored pixels do not count, as in SSUL's
    released code.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        ignore_index: label of the pixels that neither add nor count.

    Returns:
        A scalar of at least float32; 0 where all pixels are ignored.

    Raises:
        ValueError: if the shapes disagree or a label has no channel.
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

    avg_non_ignore = True  # by mmseg's name for it: a mean over the labelled pixels

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_bce') -> None:
        super().__init__(loss_weight, loss_name)

    def divisor(self, label: Tensor, ignore_index: int) -> Tensor:
        """The number of labelled pixels, 1 at least."""
        return _number_of_labelled(label, ignore_index)
