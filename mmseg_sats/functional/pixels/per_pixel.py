# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses over the pixels of a batch, computed together chunk by chunk.

Logits at the labels' size are the largest tensors of a training step, and their softmaxes are as
large again. Here they are never built as a whole: the logits of both models are resized from the head's
resolution chunk by chunk, and all losses use the same chunk and its log-probabilities. The backward pass
computes each chunk again and resizes its gradient back to the head's resolution at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmseg_sats.functional.precision import full_precision, working_dtype
from mmseg_sats.functional.resizing import ResizedLogits, Tile, TileIndex


@dataclass(frozen=True, eq=False)
class PixelChunk:
    """A chunk of pixels, the argument of the losses. Values that several losses need are computed once.

    Args:
        student: (n, K, w), the student's logits, at least float32.
        teacher: (n, K_o, w), the old model's logits; None if there is no old model.
        labels: (n, w) long.
        ignore_index: the label of ignored pixels.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    ignore_index: int = 255

    @cached_property
    def log_p(self) -> Tensor:
        """(n, K, w), the student's log-probabilities."""
        return self.student.log_softmax(1)

    @cached_property
    def q(self) -> Tensor:
        """(n, K_o, w), the old model's probabilities."""
        return self.teacher.softmax(1)

    @cached_property
    def ignored(self) -> Tensor:
        """(n, w) bool, the ignored pixels."""
        return self.labels == self.ignore_index

    @cached_property
    def targets(self) -> Tensor:
        """(n, 1, w), the channel of each label; 0 for ignored pixels."""
        return self.labels.masked_fill(self.ignored, 0).unsqueeze(1)


PerPixelLoss = Callable[[PixelChunk], Tensor]
"""Computes the loss of each pixel of a chunk: (n, w)."""


def per_pixel_losses(
    losses: Sequence[PerPixelLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> tuple[Tensor, ...]:
    """Computes the maps of several losses over the same pixels in one pass over both models' logits.

    They are computed in at least float32, regardless of autocast. The old model gets no gradient.

    Args:
        losses: each computes the loss of every pixel of a chunk.
        student: (B, K, h, w) logits of any resolution, resized bilinearly to the labels' size.
        teacher: (B, K_o, h', w'), the old model's logits, or None if no loss needs them.
        labels: (B, H, W) integers.
        align_corners: how the logits are resized.
        ignore_index: the label of ignored pixels.

    Returns:
        One map (B, H, W) for each loss.
    """
    old = None if teacher is None else teacher.detach()
    return _PerPixelLosses.apply(student, old, labels.long(), tuple(losses), align_corners, ignore_index)


class _PerPixelLosses(torch.autograd.Function):
    """The autograd function. It saves only the labels and the logits at the head's resolution."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        losses: tuple[PerPixelLoss, ...],
        align_corners: bool,
        ignore_index: int,
    ) -> tuple[Tensor, ...]:
        """Computes one map (B, H, W) of at least float32 for each loss; see :func:`per_pixel_losses`."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, labels)
        ctx.losses, ctx.options = losses, (align_corners, ignore_index)
        dtype = working_dtype(student)
        maps = tuple(student.new_empty(labels.shape, dtype=dtype) for _ in losses)
        with full_precision(student):
            for tile in _tiles(student, teacher, labels, *ctx.options):
                for index, chunk in tile.chunks():
                    for values, loss in zip(maps, losses, strict=True):
                        at = values[index]
                        at.copy_(loss(chunk).view_as(at))
        return maps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Computes the gradient (B, K, h, w) of the student's logits from those (B, H, W) of the maps.

        Raises:
            RuntimeError: a second derivative is requested (``create_graph=True``).
        """
        # torch's once_differentiable would silently give a second derivative of 0 if the outer gradient is constant.
        if torch.is_grad_enabled():
            raise RuntimeError('losses over pixels have first derivatives alone: create_graph=True')
        student, teacher, labels = ctx.saved_tensors
        asked = [pair for pair in zip(ctx.losses, grads, strict=True) if pair[1] is not None]
        total = ResizedLogits(student, labels.shape[1:], ctx.options[0]).zeros()
        with full_precision(student):
            for tile in _tiles(student, teacher, labels, *ctx.options) if asked else ():
                for index, chunk in tile.chunks():
                    x = chunk.student.requires_grad_()
                    with torch.enable_grad():
                        values = [loss(chunk) for loss, _ in asked]
                    outer = [grad[index].reshape_as(chunk.labels) for _, grad in asked]
                    tile.student.add_gradient(*torch.autograd.grad(values, x, outer), index[1])
                tile.student.give_gradient(total)
        return total.to(student.dtype), None, None, None, None, None


class _TilePair(NamedTuple):
    """The same tile of both models' logits.

    Args:
        where: the tile's place in the labels.
        rows: the rows of each of its chunks.
        student: the tile of the new model's logits.
        teacher: the tile of the old model's logits, or None.
        labels: (B, H, W), the labels of the batch.
        ignore_index: the label of ignored pixels.
    """

    where: TileIndex
    rows: list[slice]
    student: Tile
    teacher: Tile | None
    labels: Tensor
    ignore_index: int

    def chunks(self) -> Iterator[tuple[TileIndex, PixelChunk]]:
        images, _ = self.where
        for rows in self.rows:
            old = None if self.teacher is None else self.teacher.rows(rows)
            new = self.student.rows(rows)
            labels = self.labels[images, rows].reshape(len(new), -1)
            yield (images, rows), PixelChunk(new, old, labels, self.ignore_index)


def _tiles(
    student: Tensor, teacher: Tensor | None, labels: Tensor, align_corners: bool, ignore_index: int
) -> Iterator[_TilePair]:
    size = labels.shape[1:]
    new = ResizedLogits(student, size, align_corners)
    old = None if teacher is None else ResizedLogits(teacher, size, align_corners)
    for index in new.tiles():
        yield _TilePair(
            index,
            list(new.chunks(index)),
            new.tile(index),
            None if old is None else old.tile(index),
            labels,
            ignore_index,
        )
