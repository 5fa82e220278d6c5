# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MiB's unbiased cross-entropy and distillation.

Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR
2020: the cross-entropy's probabilities are eq. (5), the distillation's eq. (8).

Logits of a whole batch at the labels' size are the largest tensor of a training step, so both
losses go through them image by image, keep only per-pixel sums for backward, and write the gradient
once.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmseg_sats.suggest import check_choice


class HasLogits(Protocol):
    """What the distillation needs of a segmentor's output."""

    logits: Tensor

    def resized(self, size: tuple[int, int]) -> Tensor:
        """The logits, bilinearly resized to ``size`` (H, W)."""


def _computing_dtype(logits: Tensor) -> torch.dtype:
    """Half precision is computed in float32; float64 stays."""
    return torch.promote_types(logits.dtype, torch.float32)


class _UnbiasedNegativeLogLikelihood(torch.autograd.Function):
    """-log p of every pixel's label, (B, H, W); background stands for all the old classes."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, num_old: int, ignore_index: int
    ) -> Tensor:
        ignored = labels == ignore_index
        targets = labels.masked_fill(ignored, 0)
        shape = (3, *labels.shape)
        loss, lse_all, lse_old = logits.new_empty(shape, dtype=_computing_dtype(logits))
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
        loss, lse_all, lse_background = student.new_empty(shape, dtype=_computing_dtype(student))
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
    if logits.dim() != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f'logits must be (B, K, H, W) and labels (B, H, W) of that size, '
                         f'got {tuple(logits.shape)} and {tuple(labels.shape)}')
    channels = logits.shape[1]
    if not 1 <= num_old <= channels:
        raise ValueError(f'num_old must be in 1..K (background included), got num_old={num_old} '
                         f'for logits of K={channels} channels')
    unknown = ((labels < 0) | (labels >= channels)) & (labels != ignore_index)
    if unknown.any():
        raise ValueError(f'labels must be in 0..{channels - 1} or ignore_index={ignore_index}, for '
                         f'logits of {channels} channels, got {labels[unknown].unique().tolist()}')


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


def _check_distillation(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Raises ValueError where logits of these shapes cannot be distilled."""
    got = f'got student {student} and teacher {teacher}'
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(f'student and teacher logits must be (B, K, H, W), {got}')
    if (student[0], *student[2:]) != (teacher[0], *teacher[2:]):
        raise ValueError(f'student and teacher must agree in batch, height and width, {got}')
    if student[1] < teacher[1]:
        raise ValueError(f'the student must have at least the channels of the teacher, {got}')


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
    _check_distillation(tuple(student_logits.shape), tuple(teacher_logits.shape))
    return _UnbiasedCrossEntropyToTeacher.apply(student_logits, teacher_logits.detach()).mean()


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


@MODELS.register_module()
class UnbiasedCrossEntropyLoss(nn.Module):
    """:func:`unbiased_cross_entropy` as the ``loss_decode`` of an mmseg head.

    Args:
        num_old: K_o, the old model's channels, background included.
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.

    Raises:
        ValueError: if ``num_old`` is under 1.
    """

    def __init__(self, num_old: int, loss_weight: float = 1.0, loss_name: str = 'loss_ce') -> None:
        super().__init__()
        if num_old < 1:
            raise ValueError(f'num_old counts the background and must be at least 1, got {num_old}')
        self.num_old = num_old
        self.loss_weight = loss_weight
        self._loss_name = loss_name

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
        loss = _cross_entropy_map(pred, label, self.num_old, ignore_index)
        if weight is not None:
            if weight.shape != label.shape:
                raise ValueError(f'weight must have the shape of label {tuple(label.shape)}, '
                                 f'got {tuple(weight.shape)}')
            loss = loss * weight.to(loss.dtype)
        return self.loss_weight * _REDUCTIONS[reduction](loss, avg_factor)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (f'num_old={self.num_old}, loss_weight={self.loss_weight}, '
                f'loss_name={self._loss_name!r}')


@MODELS.register_module()
class UnbiasedDistillationLoss(nn.Module):
    """:func:`unbiased_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 10 published, 100 for VOC 15-1, 40 in the SATS comparison,
            20 as SATS's lambda_d.
    """

    needs_attention: ClassVar[bool] = False

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: HasLogits, teacher: HasLogits, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar over all pixels of ``labels`` (B, H, W), ignored ones too."""
        size = (labels.shape[-2], labels.shape[-1])
        loss = unbiased_distillation(student.resized(size), teacher.resized(size))
        return self.loss_weight * loss

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}'
