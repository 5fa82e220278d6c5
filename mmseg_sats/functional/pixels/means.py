# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Means of a loss over all pixels of a batch, and the checks of labels and logits."""

from typing import Any

import torch
from torch import Tensor

from mmseg_sats.functional.pixels.per_pixel import PerPixelLoss, reduced_losses


def mean_over_pixels(
    pixels: PerPixelLoss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """The mean of a distillation over all pixels, a scalar of at least float32.

    Args:
        pixels: computes the loss of each pixel of a chunk.
        student_logits: (B, K, H, W).
        teacher_logits: (B, K_o, H, W), the old model's logits, K_o <= K.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``; None for a loss that does not use them.
        ignore_index: label of pixels without a label.

    Raises:
        ValueError: the shapes do not fit together, or a label has no channel.
    """
    check_distillation(student_logits, teacher_logits)
    if labels is None:
        labels = student_logits.new_zeros((), dtype=torch.long).expand(
            len(student_logits), *student_logits.shape[2:]
        )
    else:
        check_labels(student_logits, labels, ignore_index)
    return pixel_mean(pixels, student_logits, teacher_logits, labels, ignore_index=ignore_index)


def mean_over_labels(
    pixels: PerPixelLoss, logits: Tensor, labels: Tensor, ignore_index: int = 255
) -> Tensor:
    """The mean of a segmentation loss over all pixels, a scalar of at least float32.

    Args:
        pixels: computes the loss of each pixel of a chunk, 0 for ignored ones, which count in the divisor.
        logits: (B, K, H, W).
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        ignore_index: label of the ignored pixels.

    Raises:
        ValueError: the shapes disagree or a label has no channel.
    """
    check_labels(logits, labels, ignore_index)
    return pixel_mean(pixels, logits, None, labels, ignore_index=ignore_index)


def pixel_mean(
    pixels: PerPixelLoss, student: Tensor, teacher: Tensor | None, labels: Tensor, **options: Any
) -> Tensor:
    """The mean over all pixels of one loss, a scalar; for the arguments see :func:`per_pixel_losses`."""
    losses = reduced_losses(lambda maps: {'mean': maps[0].mean()}, [pixels], student, teacher, labels, **options)
    return losses['mean']


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raises ValueError unless each label in (B, H, W) is a channel of logits (B, K, H, W) or ignored."""
    if logits.dim() != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f'logits must be (B, K, H, W) and labels (B, H, W) of that size, '
                         f'got {tuple(logits.shape)} and {tuple(labels.shape)}')
    check_label_values(labels, logits.shape[1], ignore_index)


def check_label_values(labels: Tensor, channels: int, ignore_index: int) -> None:
    """Raises ValueError unless each label is one of the channels or ignored."""
    unknown = ((labels < 0) | (labels >= channels)) & (labels != ignore_index)
    if unknown.any():
        raise ValueError(f'labels must be in 0..{channels - 1} or ignore_index={ignore_index}, for '
                         f'logits of {channels} channels, got {labels[unknown].unique().tolist()}')


def check_distillation(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError if student and old model differ in size, or the student has fewer channels."""
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f'student and teacher must agree in height and width, {_got(student, teacher)}'
        )
    check_channels(student, teacher)


def check_channels(student: Tensor, teacher: Tensor) -> None:
    """The same check for logits that are resized later, so that height and width may differ."""
    new, old = student.shape, teacher.shape
    got = _got(student, teacher)
    if len(new) != 4 or len(old) != 4:
        raise ValueError(f'student and teacher logits must be (B, K, H, W), {got}')
    if new[0] != old[0]:
        raise ValueError(f'student and teacher must agree in their number of images, {got}')
    if new[1] < old[1]:
        raise ValueError(f'the student must have at least the channels of the teacher, {got}')


def _got(student: Tensor, teacher: Tensor) -> str:
    return f'got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}'
