# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What losses over the pixels of a batch share: their memory, their checks, their reductions.

Logits of a whole batch at the labels' size are the largest tensor of a training step. A loss written
as a function of one image, called through :func:`by_image`, holds no more of that size than the logits
themselves and their gradient.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseg_sats.suggest import check_choice


class HasLogits(Protocol):
    """What a loss over the logits needs of a segmentor's output."""

    logits: Tensor

    def resized(self, size: tuple[int, int]) -> Tensor:
        """The logits, bilinearly resized to ``size`` (H, W)."""


def by_image(pixels: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A map of losses, computed image by image; backward computes each image's once more.

    Args:
        pixels: gives (H, W) for one image of each of ``tensors``.
        tensors: (B, ...) each.

    Returns:
        (B, H, W).
    """
    images = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
    return torch.stack(
        [
            checkpoint(pixels, *image, use_reentrant=False, preserve_rng_state=False)
            for image in images
        ]
    )


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raises ValueError unless labels (B, H, W) each have a channel in logits (B, K, H, W)."""
    if logits.dim() != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f'logits must be (B, K, H, W) and labels (B, H, W) of that size, '
                         f'got {tuple(logits.shape)} and {tuple(labels.shape)}')
    channels = logits.shape[1]
    unknown = ((labels < 0) | (labels >= channels)) & (labels != ignore_index)
    if unknown.any():
        raise ValueError(f'labels must be in 0..{channels - 1} or ignore_index={ignore_index}, for '
                         f'logits of {channels} channels, got {labels[unknown].unique().tolist()}')


def check_distillation(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError where these logits cannot be distilled: other sizes, or too few channels."""
    new, old = tuple(student.shape), tuple(teacher.shape)
    got = f'got student {new} and teacher {old}'
    if len(new) != 4 or len(old) != 4:
        raise ValueError(f'student and teacher logits must be (B, K, H, W), {got}')
    if (new[0], *new[2:]) != (old[0], *old[2:]):
        raise ValueError(f'student and teacher must agree in batch, height and width, {got}')
    if new[1] < old[1]:
        raise ValueError(f'the student must have at least the channels of the teacher, {got}')


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


class PixelLoss(nn.Module):
    """A classification loss as the ``loss_decode`` of an mmseg head; subclasses say what a pixel costs.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
    """

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_ce') -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self._loss_name = loss_name

    @abstractmethod
    def pixels(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """The loss of every pixel (B, H, W), 0 where ignored."""

    @property
    def loss_name(self) -> str:
        """Key of the loss in the head's dict."""
        return self._loss_name

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
        reduction = 'mean' if reduction_override is None else reduction_override
        check_choice('reduction_override', reduction, _REDUCTIONS)
        loss = self.pixels(pred, label, ignore_index)
        if weight is not None:
            if weight.shape != label.shape:
                raise ValueError(f'weight must have the shape of label {tuple(label.shape)}, '
                                 f'got {tuple(weight.shape)}')
            loss = loss * weight.to(loss.dtype)
        return self.loss_weight * _REDUCTIONS[reduction](loss, avg_factor)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}, loss_name={self._loss_name!r}'


class LogitsDistillation(nn.Module):
    """A distillation of logits at the labels' size; subclasses name the pure function.

    Args:
        loss_weight: factor of the loss.
    """

    needs_attention: ClassVar[bool] = False

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    @abstractmethod
    def distance(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss of logits (B, K, H, W) and (B, K_o, H, W), a scalar."""

    def forward(self, student: HasLogits, teacher: HasLogits, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar over all pixels of ``labels`` (B, H, W), ignored ones too."""
        size = (labels.shape[-2], labels.shape[-1])
        return self.loss_weight * self.distance(student.resized(size), teacher.resized(size))

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}'
