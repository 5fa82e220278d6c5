# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The pixel-wise losses of a batch, those of the head and of the distillation, in one pass.

What cannot be shared is left to its own way: a head with a ``loss_by_feat`` or a pixel sampler of its
own, a ``loss_decode`` that is not known to be a mean over pixels, an unknown class.
"""

from collections.abc import Mapping

import torch
from mmseg.models import CrossEntropyLoss
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmseg_sats.models.pixel_losses.base import (
    PixelwiseDistillationLoss,
    PixelwiseSegmentationLoss,
    check_channels,
    check_label_values,
)
from mmseg_sats.models.pixel_losses.per_pixel import PixelChunk, per_pixel_losses
from mmseg_sats.models.segmentor_output import SegmentorOutput


def check_targets(head: BaseDecodeHead, labels: Tensor, channels: int) -> None:
    """Raises ValueError for labels (B, H, W) beyond the channels of a head that asks for one each.

    On a GPU this waits for the labels, and without it such a label ends the process.
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
    """What the head's ``loss_by_feat`` and those parts that are :class:`PixelwiseDistillationLoss` give.

    Args:
        head: the decode head.
        parts: name to distillation; only those over pixels are computed.
        student: its logits may be of any resolution.
        teacher: the old model's output, or None without one.
        labels: (B, H, W) long, as ``check_targets`` wants them.
        weights: (B,), factors of the images in the head's losses, or None.

    Returns:
        Losses by the names that a segmentor gives them, ``decode.NAME`` and ``loss_NAME``; without any
        of ``decode`` where the head's cannot be computed here.

    Raises:
        ValueError: for models whose logits do not go together.
    """
    own = _pixel_losses(head)
    distilled = {
        name: part for name, part in parts.items() if isinstance(part, PixelwiseDistillationLoss)
    }
    if student.unknown is not None or not (own or distilled):
        return {}
    for loss in own:
        loss.check(student.logits.shape[1])
    if distilled and teacher is not None:  # some need none
        check_channels(student.logits, teacher.logits)
    observed = (_is_right,) if own else ()
    maps = per_pixel_losses(
        [*observed, *(loss.per_pixel for loss in (*own, *distilled.values()))],
        student.logits,
        teacher.logits if distilled and teacher is not None else None,
        labels,
        align_corners=student.align_corners,
        ignore_index=head.ignore_index,
    )
    losses: dict[str, Tensor] = {}
    image_weights = None if weights is None else weights[:, None, None].expand_as(labels)
    for loss, values in zip(own, maps[len(observed) :], strict=False):
        name = f'decode.{loss.loss_name}'
        value = loss.reduce(values, labels, image_weights, ignore_index=head.ignore_index)
        losses[name] = losses[name] + value if name in losses else value
    if own:
        losses['decode.acc_seg'] = _accuracy(maps[0].detach(), labels, head.ignore_index)
    for (name, part), values in zip(
        distilled.items(), maps[len(observed) + len(own) :], strict=True
    ):
        losses[f'loss_{name}'] = part.loss_weight * values.mean()
    return losses


def _pixel_losses(head: BaseDecodeHead) -> tuple[PixelwiseSegmentationLoss, ...]:
    """The losses of a head that works as ``BaseDecodeHead`` does; () where one is of another kind."""
    by_feat = getattr(head.loss_by_feat, '__func__', None)
    if by_feat is not BaseDecodeHead.loss_by_feat or head.sampler is not None:
        return ()
    own = head.loss_decode
    losses = [_pixel_loss(loss) for loss in (own if isinstance(own, nn.ModuleList) else [own])]
    return () if None in losses else tuple(losses)


def _pixel_loss(loss: nn.Module) -> PixelwiseSegmentationLoss | None:
    if isinstance(loss, PixelwiseSegmentationLoss):
        return loss
    # Of mmseg's losses the usual one; a subclass may do anything.
    plain = type(loss) is CrossEntropyLoss and (
        not (loss.use_sigmoid or loss.use_mask or loss.avg_non_ignore)
        and loss.class_weight is None
        and loss.reduction == 'mean'
    )
    return _CrossEntropy(loss.loss_weight, loss.loss_name) if plain else None


class _CrossEntropy(PixelwiseSegmentationLoss):
    """What mmseg's ``CrossEntropyLoss`` is by default: ignored pixels count in the divisor."""

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        own = chunk.log_p.gather(1, chunk.targets)[:, 0]
        return -own.masked_fill(chunk.ignored, 0)


def _is_right(chunk: PixelChunk) -> Tensor:
    """1 where the best channel is the label's, else 0."""
    own = chunk.student.gather(1, chunk.targets)[:, 0]
    right = (own == chunk.student.amax(1)) & ~chunk.ignored
    return right.to(own.dtype)


def _accuracy(right: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Percent of the labelled pixels that are right, with mmseg's guard against having none."""
    eps = torch.finfo(torch.float32).eps
    return (100 * (right.sum() + eps) / ((labels != ignore_index).sum() + eps)).reshape(1)
