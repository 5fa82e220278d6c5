# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Every channel as a separate binary classifier with a sigmoid: LwF-MC, SSUL and DKD.

LwF-MC is the multi-class Learning without Forgetting that Rebuffi et al., "iCaRL", CVPR 2017, compare with
(iCaRL's loss without its exemplars and its classifier), applied to pixels as in the released code of MiB.
There the old channels are trained with the labels and with the old model's sigmoids. SSUL's segmentation loss
is that of Cha et al., "SSUL", NeurIPS 2021, section 3.3. Unlike with a softmax, training a new class does not
affect the probabilities of the frozen classes. So Baek et al., "Decomposed Knowledge Distillation", NeurIPS 2022,
train the channels of the new classes alone with the labels, and have none for background.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.pixels.means import mean_over_labels, mean_over_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk
from mmseg_sats.functional.pixels.unbiased import check_num_old


def sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = 255,
    *,
    num_old: int = 1,
    background: bool = True,
    pos_weight: float = 1.0,
) -> Tensor:
    """Binary cross-entropy of the trained channels against one-hot labels, summed over these channels.

    A pixel with label y costs ``-w log s(x_y)`` in channel y and ``-log(1 - s(x_c))`` in every other channel c, where s
    is the sigmoid and w is ``pos_weight``.

    Args:
        logits: (B, K, H, W), the new model's logits at the labels' size.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        ignore_index: label of pixels that add 0 to the sum and still count in the divisor.
        num_old: K_o; channels 1 to K_o - 1, those of the old classes, are left out. 1 leaves out none.
        background: whether channel 0 is trained; False leaves it out too.
        pos_weight: factor of the loss of a label's own channel.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the shapes disagree, a label has no channel, or no channel is left.
    """
    check_trained(num_old, background, logits.shape[1])
    pixels = partial(sigmoid_cross_entropy_of_pixels, num_old=num_old, background=background, pos_weight=pos_weight)
    return mean_over_labels(pixels, logits, labels, ignore_index)


def sigmoid_cross_entropy_of_pixels(
    chunk: PixelChunk, num_old: int = 1, background: bool = True, pos_weight: float = 1.0
) -> Tensor:
    """The loss of each pixel of a chunk, (n, w), 0 for ignored pixels."""
    one_hot = torch.zeros_like(chunk.student).scatter_(1, chunk.targets, 1)
    x, one_hot = (_trained(values, num_old, background) for values in (chunk.student, one_hot))
    weight = None if pos_weight == 1 else x.new_tensor(pos_weight)
    loss = F.binary_cross_entropy_with_logits(x, one_hot, reduction='none', pos_weight=weight).sum(1)
    return loss.masked_fill(chunk.ignored, 0)


def _trained(values: Tensor, num_old: int, background: bool) -> Tensor:
    """The trained channels of values (n, K, w)."""
    if not background:
        return values[:, num_old:]
    return values if num_old == 1 else torch.cat([values[:, :1], values[:, num_old:]], 1)


def check_trained(num_old: int, background: bool, channels: int) -> None:
    """Raises ValueError unless 1 <= num_old <= channels and a channel is left to train."""
    check_num_old(num_old, channels)
    if num_old == channels and not background:
        raise ValueError(f'background=False and num_old={num_old} leave none of {channels} channels to train')


def sigmoid_distillation(student_logits: Tensor, teacher_logits: Tensor, *, background: bool = True) -> Tensor:
    """K_o mean BCE(x[0:K_o], the old model's sigmoids): a mean over pixels, a sum over old channels.

    Args:
        student_logits: (B, K, H, W), K >= K_o; the first K_o channels are those of the old model.
        teacher_logits: (B, K_o, H, W), the old model's logits, which get no gradient.
        background: whether channel 0 is distilled. One that is constant has no gradient.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the sizes disagree, or the student has fewer channels than the old model.
    """
    pixels = partial(sigmoid_distillation_of_pixels, background=background)
    return mean_over_pixels(pixels, student_logits, teacher_logits)


def sigmoid_distillation_of_pixels(chunk: PixelChunk, background: bool = True) -> Tensor:
    """The loss of each pixel of a chunk, (n, w)."""
    first = 0 if background else 1
    x, old = chunk.student[:, first : chunk.teacher.shape[1]], chunk.teacher[:, first:].sigmoid()
    return F.binary_cross_entropy_with_logits(x, old, reduction='none').sum(1)


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
    return mean * labels.numel() / number_of_labelled(labels, ignore_index)


def number_of_labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """How many labels are not ignored, at least 1."""
    return (labels != ignore_index).sum().clamp(min=1)
