# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What losses over the pixels of a batch share: what they see, their checks, their reductions.

Such a loss says what one pixel costs, of a chunk of the batch's pixels; see
``mmseg_sats.models.pixel_losses.per_pixel`` for how several of them are computed in one pass.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from mmseg_sats.models.parts import DistillationPart
from mmseg_sats.models.pixel_losses.per_pixel import PixelChunk, per_pixel_losses
from mmseg_sats.utils.spelling import check_choice


class HasLogits(Protocol):
    """What a loss over the logits needs of a segmentor's output."""

    logits: Tensor
    align_corners: bool



def check_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raises ValueError unless labels (B, H, W) each have a channel in logits (B, K, H, W)."""
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
    """Raises ValueError where these logits cannot be distilled: other sizes, or too few channels."""
    if student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f'student and teacher must agree in height and width, {_got(student, teacher)}'
        )
    check_channels(student, teacher)


def check_channels(student: Tensor, teacher: Tensor) -> None:
    """The same for logits that are yet to be resized."""
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


def _mean(loss: Tensor, avg_factor: float | None) -> Tensor:
    return loss.mean() if avg_factor is None else loss.sum() / avg_factor


def _sum(loss: Tensor, avg_factor: float | None) -> Tensor:
    if avg_factor is not None:
        raise ValueError(f"avg_factor={avg_factor} divides a mean, got reduction_override='sum'")
    return loss.sum()


_REDUCTIONS: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    'mean': _mean,
    'sum': _sum,
    'none': lambda loss, avg_factor: loss,
}


class PixelwiseLoss(nn.Module):
    """A loss that is a mean over pixels; subclasses say what one costs.

    Those of a segmentor's head and its distillation are computed together.

    Args:
        loss_weight: factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    @abstractmethod
    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}'


class PixelwiseSegmentationLoss(PixelwiseLoss):
    """A classification loss as the ``loss_decode`` of an mmseg head; 0 where ignored.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
    """

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_ce') -> None:
        super().__init__(loss_weight)
        self._loss_name = loss_name

    @property
    def loss_name(self) -> str:
        """Key of the loss in the head's dict."""
        return self._loss_name

    def check(self, channels: int) -> None:
        """Raises ValueError where the loss has no meaning for logits of so many channels."""

    def forward(
        self,
        pred: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """The weighted loss, as ``BaseDecodeHead.loss_by_feat`` and its pixel samplers call it.

        Args:
            pred: (B, K, H, W) logits.
            label: (B, H, W) integers.
            weight: (B, H, W), factor of each pixel (mmseg's samplers give 0 and 1); the divisor
                is still the number of pixels.
            avg_factor: divisor in place of the number of pixels.
            reduction_override: ``'mean'`` (as None), ``'sum'``, or ``'none'`` for a (B, H, W) map.
            ignore_index: label of pixels that add nothing.

        Raises:
            ValueError: for shapes, labels or a reduction that do not fit.
        """
        check_labels(pred, label, ignore_index)
        self.check(pred.shape[1])
        (loss,) = per_pixel_losses([self.per_pixel], pred, None, label, ignore_index=ignore_index)
        return self.reduce(loss, label, weight, avg_factor, reduction_override, ignore_index)

    def reduce(
        self,
        loss: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """The weighted loss from its map (B, H, W); for the rest see :meth:`forward`."""
        reduction = 'mean' if reduction_override is None else reduction_override
        check_choice('reduction_override', reduction, _REDUCTIONS)
        if avg_factor is None and reduction == 'mean':
            avg_factor = self.divisor(label, ignore_index)
        if weight is not None:
            if weight.shape != label.shape:
                raise ValueError(f'weight must have the shape of label {tuple(label.shape)}, '
                                 f'got {tuple(weight.shape)}')
            loss = loss * weight.to(loss.dtype)
        return self.loss_weight * _REDUCTIONS[reduction](loss, avg_factor)

    def divisor(self, label: Tensor, ignore_index: int) -> Tensor | None:
        """What the sum over labels (B, H, W) is divided by; None for the number of pixels."""

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'{super().extra_repr()}, loss_name={self._loss_name!r}'


class PixelwiseDistillationLoss(PixelwiseLoss, DistillationPart):
    """A distillation of logits at the labels' size: the mean over all pixels, ignored ones too."""

    def distance(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss, without its weight, of logits (B, K, H, W) and (B, K_o, H, W), a scalar."""
        return mean_over_pixels(self.per_pixel, student_logits, teacher_logits)

    def forward(self, student: HasLogits, teacher: HasLogits | None, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar, at the size of ``labels`` (B, H, W).

        ``teacher`` is None in a stage without an old model, which only a part that has
        ``needs_teacher = False`` sees.
        """
        if teacher is not None:
            check_channels(student.logits, teacher.logits)
        (loss,) = per_pixel_losses(
            [self.per_pixel],
            student.logits,
            None if teacher is None else teacher.logits,
            labels,
            align_corners=student.align_corners,
        )
        return self.loss_weight * loss.mean()


def mean_over_pixels(
    pixels: Callable[[PixelChunk], Tensor], student_logits: Tensor, teacher_logits: Tensor
) -> Tensor:
    """The mean of a distillation over all pixels, a scalar of at least float32.

    Args:
        pixels: what each pixel of a chunk costs.
        student_logits: (B, K, H, W).
        teacher_logits: (B, K_o, H, W), of the same size, with at most as many channels.

    Raises:
        ValueError: for other shapes.
    """
    check_distillation(student_logits, teacher_logits)
    labels = student_logits.new_zeros((), dtype=torch.long).expand(
        len(student_logits), *student_logits.shape[2:]
    )
    (loss,) = per_pixel_losses([pixels], student_logits, teacher_logits, labels)
    return loss.mean()
