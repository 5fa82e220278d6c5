# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The base classes of losses over the pixels of a batch, and their reductions.

Such a loss computes the loss of each pixel of a chunk of pixels. See
``mmseg_sats.functional.pixels.per_pixel`` for how several of them are computed in one pass.
"""

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from mmseg_sats.functional.pixels.means import (
    check_channels,
    check_labels,
    mean_over_pixels,
    pixel_mean,
)
from mmseg_sats.functional.pixels.per_pixel import PixelChunk, per_pixel_losses
from mmseg_sats.models.parts import DistillationPart
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.utils.spelling import check_choice


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
    """A loss that is a mean over pixels; subclasses compute the loss of each pixel.

    The losses of this kind of a segmentor's head and its distillation are computed together.

    Args:
        loss_weight: factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    @abstractmethod
    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """Returns the loss of each pixel of a chunk, (n, w)."""

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}'


class PixelwiseSegmentationLoss(PixelwiseLoss):
    """A classification loss that can be the ``loss_decode`` of an mmseg head; it is 0 on ignored pixels.

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
        """Raises ValueError if the loss is not defined for logits with this number of channels."""

    def forward(
        self,
        pred: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """Computes the weighted loss; called by ``BaseDecodeHead.loss_by_feat``, with weights of its pixel sampler.

        Args:
            pred: (B, K, H, W) logits.
            label: (B, H, W) integers.
            weight: (B, H, W), factor of each pixel (mmseg's samplers return 0 and 1); the divisor
                is still the number of pixels.
            avg_factor: divisor to use instead of the number of pixels.
            reduction_override: ``'mean'`` (the default), ``'sum'``, or ``'none'`` for a (B, H, W) map.
            ignore_index: label of pixels whose loss is 0.

        Raises:
            ValueError: the shapes, labels or reduction do not fit.
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
        """Computes the weighted loss from its map (B, H, W); for the other arguments see :meth:`forward`."""
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
        """The divisor of the sum over the pixels of ``label`` (B, H, W); None for the number of pixels."""

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'{super().extra_repr()}, loss_name={self._loss_name!r}'


class PixelwiseDistillationLoss(PixelwiseLoss, DistillationPart):
    """A distillation of logits at the labels' size: the mean over all pixels, including ignored ones."""

    def distance(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """The unweighted loss of logits (B, K, H, W) and (B, K_o, H, W), a scalar.

        ``labels`` (B, H, W) are needed by a loss that depends on them; without them every pixel is background.
        """
        return mean_over_pixels(self.per_pixel, student_logits, teacher_logits, labels)

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor) -> Tensor:
        """Computes the weighted loss, a scalar, at the size of ``labels`` (B, H, W).

        ``teacher``, the old model's output, may be None only if ``needs_teacher`` is False.
        """
        if teacher is not None:
            check_channels(student.logits, teacher.logits)
        return self.loss_weight * pixel_mean(
            self.per_pixel,
            student.logits,
            None if teacher is None else teacher.logits,
            labels,
            align_corners=student.align_corners,
        )
