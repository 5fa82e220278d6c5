# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses over the pixels of a batch, computed together chunk by chunk.

Logits at the labels' size are the largest tensors of a training step, and their softmaxes are as
large again. Here they are never built as a whole: the logits of both models are resized from the head's
resolution chunk by chunk, and all losses use the same chunk and its log-probabilities. The gradient of a chunk is
resized back to the head's resolution at once. It is computed with the values where the factors of the losses are
known by then (:func:`reduced_losses`); otherwise the backward pass computes each chunk again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

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
Maps = tuple[Tensor, ...]
"""One map (B, H, W) for each loss."""


def per_pixel_losses(
    losses: Sequence[PerPixelLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> Maps:
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
    return _maps(losses, student, teacher, labels, None, align_corners, ignore_index)


def reduced_losses(
    reduce: Callable[[Maps], dict[str, Tensor]],
    losses: Sequence[PerPixelLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    align_corners: bool = False,
    ignore_index: int = 255,
) -> dict[str, Tensor]:
    """Computes ``reduce(maps)`` of :func:`per_pixel_losses`, with the gradient of enlarged logits in the same pass.

    The gradient is that of the sum of what ``reduce`` returns, and serves for multiples of it too. If backward asks
    for another one, such as that of a single one of several losses, the chunks are computed once more.

    Args:
        reduce: makes scalars of the maps (B, H, W); linear in them, such as weighted means. It is called twice: first
            on zeros, to see its gradient.
        losses: see :func:`per_pixel_losses`, as all other arguments.
    """
    expected = None
    # The gradient of logits of the labels' size is as large as what is avoided here, so it is not kept for backward.
    enlarged = student.shape[2:].numel() < labels.shape[1:].numel()
    if torch.is_grad_enabled() and student.requires_grad and enlarged:
        zeros = [
            student.new_zeros(labels.shape, dtype=working_dtype(student)).requires_grad_() for _ in losses
        ]
        # Of clones, since reduce may work in place.
        total = sum(
            value.sum() for value in reduce(tuple(zero.clone() for zero in zeros)).values() if value.requires_grad
        )
        if isinstance(total, Tensor):
            # A linear function has the same gradient everywhere.
            expected = torch.autograd.grad(total, zeros, allow_unused=True)
    return reduce(_maps(losses, student, teacher, labels, expected, align_corners, ignore_index))


def _maps(
    losses: Sequence[PerPixelLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    expected: Maps | None,
    align_corners: bool,
    ignore_index: int,
) -> Maps:
    old = None if teacher is None else teacher.detach()
    options = (align_corners, ignore_index)
    return _PerPixelLosses.apply(student, old, labels.long(), tuple(losses), options, *(expected or ()))


class _PerPixelLosses(torch.autograd.Function):
    """The autograd function. It saves labels and logits at the head's resolution, and their gradient if it is known."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        losses: tuple[PerPixelLoss, ...],
        options: tuple[bool, int],
        *expected: Tensor | None,
    ) -> Maps:
        """Computes one map (B, H, W) of at least float32 for each loss; see :func:`per_pixel_losses`.

        If ``expected`` are given, the gradients that backward will probably bring for the maps, to a common factor,
        that of the student's logits is computed at once.
        """
        ctx.set_materialize_grads(False)
        ctx.losses, ctx.options = losses, options
        maps = tuple(student.new_empty(labels.shape, dtype=working_dtype(student)) for _ in losses)
        gradient = _go_through(student, teacher, labels, losses, options, maps, expected or None)
        ctx.save_for_backward(student, teacher, labels, gradient, *expected)
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
        student, teacher, labels, gradient, *expected = ctx.saved_tensors
        factor = None if gradient is None else _common_factor(grads, expected)
        if factor is None:
            asked = [pair for pair in zip(ctx.losses, grads, strict=True) if pair[1] is not None]
            losses, outer = zip(*asked, strict=True) if asked else ((), ())
            gradient = _go_through(student, teacher, labels, losses, ctx.options, None, outer)
        elif factor != 1:
            gradient = gradient * factor
        return gradient.to(student.dtype), None, None, None, None, *(None for _ in expected)


def _common_factor(grads: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float | None:
    """The factor between the expected gradients and ``grads``, which holds to rounding; None if there is none."""
    if [one is None for one in grads] != [one is None for one in expected]:
        return None
    # Image by image, since all memory of the step is in use now.
    pairs = [
        pair for one, other in zip(grads, expected, strict=True) if one is not None
        for pair in zip(one, other, strict=True)
    ]  # fmt: skip
    if not pairs:
        return None
    product, square = (
        torch.stack([torch.mul(*factors).sum(dtype=torch.float64) for factors in terms]).sum()
        for terms in (pairs, [(other, other) for _, other in pairs])
    )
    factor = product / square
    tolerance = 8 * torch.finfo(pairs[0][0].dtype).eps  # of some multiplications in another order
    close = [torch.isclose(one, other * factor.to(other.dtype), rtol=tolerance, atol=0).all() for one, other in pairs]
    # The one place that waits for a GPU.
    found, holds = torch.stack([factor, torch.stack(close).all().double()]).tolist()
    return found if holds else None


def _go_through(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    losses: Sequence[PerPixelLoss],
    options: tuple[bool, int],
    maps: Maps | None,
    outer: Sequence[Tensor | None] | None,
) -> Tensor | None:
    """One pass over all chunks: fills the maps, if given, and returns the student's gradient, if those of the maps are.

    Args:
        student: (B, K, h, w), as all others up to ``losses`` an argument of :func:`per_pixel_losses`.
        teacher: (B, K_o, h', w') or None.
        labels: (B, H, W).
        losses: the losses.
        options: ``align_corners`` and ``ignore_index``.
        maps: (B, H, W) for each loss, to be filled.
        outer: (B, H, W) for each loss, the gradients of the maps, None for a map without one.
    """
    asked = () if outer is None else [number for number, grad in enumerate(outer) if grad is not None]
    total = None if outer is None else ResizedLogits(student, labels.shape[1:], options[0]).zeros()
    # Whoever recomputes or moves what a graph saves, such as checkpointing, must leave the small graphs of the chunks
    # alone. Detached, for an output that is saved as it is would keep its own graph alive.
    with full_precision(student), saved_tensors_hooks(Tensor.detach, Tensor.detach):
        for tile in _tiles(student, teacher, labels, *options) if losses else ():
            for index, chunk in tile.chunks():
                with torch.set_grad_enabled(bool(asked)):
                    x = chunk.student.requires_grad_(bool(asked))
                    values = [loss(chunk) for loss in losses]
                if maps is not None:
                    for one, value in zip(maps, values, strict=True):
                        at = one[index]
                        at.copy_(value.detach().view_as(at))
                if asked:
                    grads = [outer[number][index].reshape_as(chunk.labels) for number in asked]
                    (grad,) = torch.autograd.grad([values[number] for number in asked], x, grads)
                    tile.student.add_gradient(grad, index[1])
            if asked:
                tile.student.give_gradient(total)
    return total


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
