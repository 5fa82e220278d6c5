# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Computes the pixel-wise losses of a batch, those of the head and of the distillation, in one pass.

Some losses cannot be computed here and are left to the caller: those of a head with its own
``loss_by_feat`` or with a pixel sampler, those whose ``loss_decode`` is not known to be a mean over pixels,
and all losses of a model with rows beside its channels.
"""

from collections.abc import Mapping

import torch
from mmseg.models import CrossEntropyLoss
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmseg_sats.functional.pixels.means import check_channels, check_label_values
from mmseg_sats.functional.pixels.per_pixel import Maps, PixelChunk, reduced_losses
from mmseg_sats.models.pixel_losses.base import PixelwiseDistillationLoss, PixelwiseSegmentationLoss
from mmseg_sats.models.pixel_losses.image_weights import weights_of_pixels
from mmseg_sats.models.segmentor_output import SegmentorOutput


def check_targets(head: BaseDecodeHead, labels: Tensor, channels: int) -> None:
    """Raises ValueError if a label in (B, H, W) has no channel, for heads whose loss is computed here.

    On a GPU this waits for the labels. Without this check, such a label would crash the process there.
    """
    if _pixel_losses(head):
        check_label_values(labels, channels, head.ignore_index)


def shared_losses(
    head: BaseDecodeHead,
    parts: Mapping[str, nn.Module],
    student: SegmentorOutput,
    teacher: SegmentorOutput | None,
    labels: Tensor,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Computes the losses of the head and of those parts that are a :class:`PixelwiseDistillationLoss`.

    Args:
        head: the decode head.
        parts: name to distillation; only losses over pixels are computed.
        student: the student's output; its logits may have any resolution.
        teacher: the old model's output, or None if there is no old model.
        labels: (B, H, W) long, which have passed ``check_targets``.
        weights: factors in the head's losses, (B, H, W) of the pixels or (B,) of the images, or None.

    Returns:
        The losses by the names that a segmentor gives them, ``decode.NAME`` and ``loss_NAME``. There are no
        ``decode`` entries if the head's losses cannot be computed here.

    Raises:
        ValueError: the logits of the two models do not fit together.
    """
    own = _pixel_losses(head)
    distilled = {
        name: part for name, part in parts.items() if isinstance(part, PixelwiseDistillationLoss)
    }
    if student.trained_logits is not student.logits or not (own or distilled):
        return {}
    for loss in own:
        loss.check(student.logits.shape[1])
    if distilled and teacher is not None:  # some parts need no old model
        check_channels(student.logits, teacher.logits)
    observed = (_is_right,) if own else ()
    factors = None if weights is None else weights_of_pixels(weights, labels)

    def reduce(maps: Maps) -> dict[str, Tensor]:
        """The losses by their names, from the maps (B, H, W) of ``observed``, ``own`` and ``distilled``."""
        losses: dict[str, Tensor] = {}
        for loss, values in zip(own, maps[len(observed) :], strict=False):
            name = f'decode.{loss.loss_name}'
            value = loss.reduce(values, labels, factors, ignore_index=head.ignore_index)
            losses[name] = losses[name] + value if name in losses else value
        if own:
            losses['decode.acc_seg'] = _accuracy(maps[0].detach(), labels, head.ignore_index)
        for (name, part), values in zip(
            distilled.items(), maps[len(observed) + len(own) :], strict=True
        ):
            losses[f'loss_{name}'] = part.loss_weight * values.mean()
        return losses

    return reduced_losses(
        reduce,
        [*observed, *(loss.per_pixel for loss in (*own, *distilled.values()))],
        student.logits,
        teacher.logits if distilled and teacher is not None else None,
        labels,
        align_corners=student.align_corners,
        ignore_index=head.ignore_index,
    )


def _pixel_losses(head: BaseDecodeHead) -> tuple[PixelwiseSegmentationLoss, ...]:
    """The losses of a head that computes them as ``BaseDecodeHead`` does; () if one of them is not pixel-wise."""
    by_feat = getattr(head.loss_by_feat, '__func__', None)
    if by_feat is not BaseDecodeHead.loss_by_feat or head.sampler is not None:
        return ()
    own = head.loss_decode
    losses = [_pixel_loss(loss) for loss in (own if isinstance(own, nn.ModuleList) else [own])]
    return () if None in losses else tuple(losses)


def _pixel_loss(loss: nn.Module) -> PixelwiseSegmentationLoss | None:
    if isinstance(loss, PixelwiseSegmentationLoss):
        return loss
    # Of mmseg's losses only plain cross-entropy is supported; a subclass may compute anything.
    plain = type(loss) is CrossEntropyLoss and (
        not (loss.use_sigmoid or loss.use_mask or loss.avg_non_ignore)
        and loss.class_weight is None
        and loss.reduction == 'mean'
    )
    return _CrossEntropy(loss.loss_weight, loss.loss_name) if plain else None


class _CrossEntropy(PixelwiseSegmentationLoss):
    """mmseg's ``CrossEntropyLoss`` with its default options: ignored pixels count in the divisor."""

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        own = chunk.log_p.gather(1, chunk.targets)[:, 0]
        return -own.masked_fill(chunk.ignored, 0)


def _is_right(chunk: PixelChunk) -> Tensor:
    """1 for pixels whose largest logit is that of the label, else 0."""
    own = chunk.student.gather(1, chunk.targets)[:, 0]
    right = (own == chunk.student.amax(1)) & ~chunk.ignored
    return right.to(own.dtype)


def _accuracy(right: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The percentage of pixels with a label that are right; as in mmseg, a small number avoids 0 / 0."""
    eps = torch.finfo(torch.float32).eps
    return (100 * (right.sum() + eps) / ((labels != ignore_index).sum() + eps)).reshape(1)
