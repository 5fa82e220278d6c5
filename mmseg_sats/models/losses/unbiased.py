# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MiB's unbiased cross-entropy and distillation.

Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR
2020: the cross-entropy's probabilities are eq. (5), the distillation's eq. (8).

Logits of a whole batch at the labels' size are the largest tensor of a training step, so both
losses go through them image by image, keep only per-pixel sums for backward, and write the gradient
once.
"""

from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_sats.models.attention import working_dtype
from mmseg_sats.models.losses.pixelwise import (
    LogitsDistillation,
    PixelLoss,
    check_distillation,
    check_labels,
)


class _UnbiasedNegativeLogLikelihood(torch.autograd.Function):
    """-log p of every pixel's label, (B, H, W); background stands for all the old classes."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, num_old: int, ignore_index: int
    ) -> Tensor:
        ignored = labels == ignore_index
        targets = labels.masked_fill(ignored, 0)
        shape = (3, *labels.shape)
        loss, lse_all, lse_old = logits.new_empty(shape, dtype=working_dtype(logits))
        for i, target in enumerate(targets):
            x = logits[i].to(loss.dtype)
            lse_all[i] = x.logsumexp(0)
            lse_old[i] = x[:num_old].logsumexp(0)
            own = x.gather(0, target[None])[0]
            loss[i] = lse_all[i] - torch.where(target == 0, lse_old[i], own)
        ctx.save_for_backward(logits, targets, ignored, lse_all, lse_old)
        ctx.num_old = num_old
        return loss.masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, ignored, lse_all, lse_old = ctx.saved_tensors
        grad_loss = grad_loss.masked_fill(ignored, 0)
        grad = torch.empty_like(logits)
        for i, (target, scale) in enumerate(zip(targets, grad_loss, strict=True)):
            x = logits[i].to(lse_all.dtype)
            background = target == 0
            image_grad = (x - lse_all[i]).exp_().mul_(scale)
            old = (x[:ctx.num_old] - lse_old[i]).exp_().mul_(scale * background)
            image_grad[:ctx.num_old] -= old
            image_grad.scatter_add_(0, target[None], -(scale * ~background)[None])
            grad[i] = image_grad
        return grad, None, None, None


class _UnbiasedCrossEntropyToTeacher(torch.autograd.Function):
    """The distillation of every pixel, (B, H, W), divided by the old model's channels."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        num_old = teacher.shape[1]
        shape = (3, student.shape[0], *student.shape[2:])
        loss, lse_all, lse_background = student.new_empty(shape, dtype=working_dtype(student))
        for i, logits in enumerate(student):
            x = logits.to(loss.dtype)
            q = teacher[i].to(loss.dtype).softmax(0)
            lse_all[i] = x.logsumexp(0)
            lse_background[i] = _background_and_new(x, num_old).logsumexp(0)
            background = q[0] * (lse_background[i] - lse_all[i])
            loss[i] = -(background + (q[1:] * (x[1:num_old] - lse_all[i])).sum(0)) / num_old
        ctx.save_for_backward(student, teacher, lse_all, lse_background)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        student, teacher, lse_all, lse_background = ctx.saved_tensors
        num_old = teacher.shape[1]
        grad = torch.empty_like(student)
        for i, scale in enumerate(grad_loss / num_old):
            x = student[i].to(lse_all.dtype)
            q = teacher[i].to(lse_all.dtype).softmax(0)
            image_grad = (x - lse_all[i]).exp_()
            background = (_background_and_new(x, num_old) - lse_background[i]).exp_().mul_(q[0])
            image_grad[0] -= background[0]
            image_grad[1:num_old] -= q[1:]
            image_grad[num_old:] -= background[1:]
            grad[i] = image_grad.mul_(scale)
        return grad, None


def _background_and_new(x: Tensor, num_old: int) -> Tensor:
    """The channels of (K, H, W) logits that the old model called background."""
    return torch.cat([x[:1], x[num_old:]])


def _check_cross_entropy(logits: Tensor, labels: Tensor, num_old: int, ignore_index: int) -> None:
    """Raises ValueError where :func:`unbiased_cross_entropy` has no meaning."""
    check_labels(logits, labels, ignore_index)
    channels = logits.shape[1]
    if not 1 <= num_old <= channels:
        raise ValueError(f'num_old must be in 1..K (background included), got num_old={num_old} '
                         f'for logits of K={channels} channels')


def _cross_entropy_map(logits: Tensor, labels: Tensor, num_old: int, ignore_index: int) -> Tensor:
    """The unbiased cross-entropy of every pixel, (B, H, W), 0 where ignored."""
    _check_cross_entropy(logits, labels, num_old, ignore_index)
    return _UnbiasedNegativeLogLikelihood.apply(logits, labels.long(), num_old, ignore_index)


def unbiased_cross_entropy(
    logits: Tensor, labels: Tensor, num_old: int, ignore_index: int = 255
) -> Tensor:
    """MiB's cross-entropy: label 0 may be any class of the old model (eq. (5)).

    log p(0) = lse(x[0:K_o]) - lse(x); log p(c) = x_c - lse(x) for every other label, be it an old
    class.

    Args:
        logits: (B, K, H, W), the new model's at the labels' size.
        labels: (B, H, W) integers in 0..K-1, or ``ignore_index``.
        num_old: K_o, the old model's channels, background included; 1 is plain cross-entropy.
        ignore_index: label of pixels that add 0 to the sum and still count in the divisor.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: if the shapes disagree, ``num_old`` is not in 1..K, or a label has no channel.
    """
    return _cross_entropy_map(logits, labels, num_old, ignore_index).mean()


def unbiased_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """MiB's distillation: the old background stands for background and new classes (eq. (8)).

    -(1/K_o) mean_pixels [q_0 (lse(x_0, x_new) - lse(x)) + sum_{c=1}^{K_o-1} q_c (x_c - lse(x))]
    with x the student's logits and q the softmax of the teacher's.

    Args:
        student_logits: (B, K, H, W), K >= K_o; its first K_o channels are the teacher's classes.
        teacher_logits: (B, K_o, H, W), background first. No gradient flows into it.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: if the sizes disagree, or the student has fewer channels than the teacher.
    """
    check_distillation(student_logits, teacher_logits)
    return _UnbiasedCrossEntropyToTeacher.apply(student_logits, teacher_logits.detach()).mean()


@MODELS.register_module()
class UnbiasedCrossEntropyLoss(PixelLoss):
    """:func:`unbiased_cross_entropy` as the ``loss_decode`` of an mmseg head.

    Only background stands for the old classes. Where an old class is labelled (the ``sequential``
    setting, exemplars of a memory, pseudo-labels), that label is believed, and the pixel costs plain
    cross-entropy. MiB's released code turns such labels into background first, so that they would say
    no more than "some old class"; without them, in ``overlapped`` and ``disjoint``, both are the same.

    Args:
        num_old: K_o, the old model's channels, background included.
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.

    Raises:
        ValueError: if ``num_old`` is under 1.
    """

    def __init__(self, num_old: int, loss_weight: float = 1.0, loss_name: str = 'loss_ce') -> None:
        super().__init__(loss_weight, loss_name)
        if num_old < 1:
            raise ValueError(f'num_old counts the background and must be at least 1, got {num_old}')
        self.num_old = num_old

    def pixels(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """The loss of every pixel (B, H, W), 0 where ignored."""
        return _cross_entropy_map(logits, labels, self.num_old, ignore_index)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'num_old={self.num_old}, {super().extra_repr()}'


@MODELS.register_module()
class UnbiasedDistillationLoss(LogitsDistillation):
    """:func:`unbiased_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 10 published, 100 for VOC 15-1, 40 in the SATS comparison,
            20 as SATS's lambda_d.
    """

    def distance(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """See :func:`unbiased_distillation`."""
        return unbiased_distillation(student_logits, teacher_logits)
