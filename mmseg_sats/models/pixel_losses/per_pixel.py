# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses over the pixels of a batch, computed together a chunk at a time.

Logits at the labels' size are the largest tensors of a training step, and their softmaxes are as
large again. No loss needs them as a whole: here both models' logits, at the head's resolution, are
resized a chunk at a time, every loss sees the same chunk and its log-probabilities, and backward
computes each chunk once more and brings its gradient straight back to the head's resolution.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmseg_sats.models.precision import full_precision, working_dtype
from mmseg_sats.models.resizing import ResizedLogits, Tile, TileIndex


@dataclass(frozen=True, eq=False)
class PixelChunk:
    """Some pixels as the losses see them; what several losses want is computed once.

    Args:
        student: (n, K, w) logits, float32 at least.
        teacher: (n, K_o, w), the old model's; None where there is none.
        labels: (n, w) long.
        ignore_index: the label of pixels without a label.
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
        """(n, w) bool, the pixels without a label."""
        return self.labels == self.ignore_index

    @cached_property
    def targets(self) -> Tensor:
        """(n, 1, w), the channel of each label; 0 where ignored."""
        return self.labels.masked_fill(self.ignored, 0).unsqueeze(1)


PerPixelLoss = Callable[[PixelChunk], Tensor]
"""What a loss costs at each pixel: (n, w)."""


def per_pixel_losses(
    losses: Sequence[PerPixelLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> tuple[Tensor, ...]:
    """The maps of several losses over the same pixels, in one pass over both models' logits.

    Computed in float32 at least, whatever autocast says. No gradient reaches the teacher.

    Args:
        losses: each gives the loss of every pixel of a chunk.
        student: (B, K, h, w) logits of any resolution, resized bilinearly to the labels' size.
        teacher: (B, K_o, h', w'), or None where no loss asks for it.
        labels: (B, H, W) integers.
        align_corners: how the logits are resized.
        ignore_index: the label of pixels without a label.

    Returns:
        One (B, H, W) for each loss.
    """
    old = None if teacher is None else teacher.detach()
    return _PerPixelLosses.apply(student, old, labels.long(), tuple(losses), align_corners, ignore_index)


class _PerPixelLosses(torch.autograd.Function):
    """Saves the logits at the head's resolution and the labels alone."""

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
        """One (B, H, W) of at least float32 for each loss; see :func:`per_pixel_losses`."""
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
        """The gradient (B, K, h, w) of the student's logits, from those (B, H, W) of the maps.

        Raises:
            RuntimeError: a second derivative is asked for (``create_graph=True``).
        """
        # torch's once_differentiable would let it pass as 0 where the outer gradient is a constant.
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
    """A tile of the batch, of both models.

    Args:
        where: it lies in the labels.
        rows: those of its chunks.
        student: the new model's logits there.
        teacher: the old model's.
        labels: (B, H, W), those of the batch.
        ignore_index: the label of pixels without a label.
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
