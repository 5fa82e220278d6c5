# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""REMINDER's distillation: on a new class's pixels, the old model's scores of the old classes that resemble it.

Phan et al., "Class Similarity Weighted Knowledge Distillation for Continual Semantic Segmentation", CVPR 2022
(CSW-KD), with the threshold, temperature and divisor of their released code.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.over_ranks import sum_over_ranks
from mmseg_sats.functional.pixels.means import check_channels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk, per_pixel_losses
from mmseg_sats.functional.precision import full_precision, working_dtype


def class_similarities(prototypes: Tensor, known: Tensor, num_old: int, delta: float = 1.0) -> Tensor:
    """How much each class resembles each of the old classes that have a prototype.

    A class's similarities are the softmax of the cosines between its prototype and those of the old classes.
    Similarities below ``delta`` / n, with n the number of old classes with a prototype, are replaced by 0; with
    ``delta`` 1, those are the similarities below the average. Background is not among the old classes.

    Args:
        prototypes: (K, C), the classes' mean features; they get no gradient.
        known: (K,) bool, which classes have a prototype.
        num_old: K_o, background included.
        delta: the threshold, in parts of the average similarity.

    Returns:
        (K, K_o) of at least float32. The row of a class without a prototype is 0, and so is the column of an old
        class without one, and background's.
    """
    known = known.to(prototypes.device)
    old = known[:num_old].clone()
    old[0] = False
    directions = F.normalize(prototypes.detach().to(working_dtype(prototypes)), dim=1)
    # Without any old class a row would be a softmax of nothing, NaN.
    with full_precision(directions):
        cosines = (directions @ directions[:num_old].mT).masked_fill(~old, -torch.inf)
    similarities = cosines.softmax(1).nan_to_num(0)
    # The tolerance keeps classes of exactly the average similarity, whatever the rounding.
    threshold = (delta - 1e-6) / old.sum().clamp(min=1)
    similarities = similarities.masked_fill(similarities < threshold, 0)
    return similarities.masked_fill(~known[:, None], 0)


def class_similarity_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    similarities: Tensor,
    *,
    temperature: float = 3.0,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> Tensor:
    """-T^2 mean over the pixels labelled as a new class of sum_c s_yc q_c log p_c.

    y is the pixel's label, which is K_o or larger, and s_yc the similarity of classes y and c. q and p are the
    softmaxes of the old model's logits and of the student's first K_o logits, both divided by the temperature T. The
    new channels get no gradient.

    Args:
        student_logits: (B, K, h, w) of any resolution, resized bilinearly to the labels' size.
        teacher_logits: (B, K_o, h', w'), the old model's logits, which get no gradient.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        similarities: (K, K_o), see :func:`class_similarities`.
        temperature: T.
        align_corners: how the logits are resized.
        ignore_index: label of pixels without a label.

    Returns:
        A scalar of at least float32, 0 if no pixel is labelled as a new class. On several processes it is the mean
        over the pixels of all of them.

    Raises:
        ValueError: the numbers of images or channels disagree.
    """
    check_channels(student_logits, teacher_logits)
    expected = (student_logits.shape[1], teacher_logits.shape[1])
    if tuple(similarities.shape) != expected:
        raise ValueError(f'similarities must be (K, K_o) = {expected}, got {tuple(similarities.shape)}')
    pixels = partial(class_similarity_distillation_of_pixels, similarities=similarities, temperature=temperature)
    (loss,) = per_pixel_losses(
        [pixels], student_logits, teacher_logits, labels, align_corners=align_corners, ignore_index=ignore_index
    )
    new = (labels >= teacher_logits.shape[1]) & (labels != ignore_index)
    total, number = sum_over_ranks(torch.stack([loss.sum(), new.sum().to(loss.dtype)]))
    return total / number.clamp(min=1)


def class_similarity_distillation_of_pixels(
    chunk: PixelChunk, similarities: Tensor, temperature: float = 3.0
) -> Tensor:
    """The loss of each pixel of a chunk, (n, w); 0 for pixels that are not labelled as a new class."""
    num_old = chunk.teacher.shape[1]
    own = similarities.to(chunk.student)[chunk.targets[:, 0]].movedim(-1, 1)  # (n, K_o, w)
    q = (chunk.teacher / temperature).softmax(1)
    log_p = (chunk.student[:, :num_old] / temperature).log_softmax(1)
    loss = -(temperature**2) * (own * q * log_p).sum(1)
    return loss.masked_fill(chunk.targets[:, 0] < num_old, 0)
