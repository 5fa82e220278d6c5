# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A sigmoid for each class, one against the rest: SSUL's segmentation loss.

Cha et al., "SSUL", NeurIPS 2021, section 3.3: binary cross-entropy, so that a new class's row does not
push the scores of frozen rows, as a softmax would.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.suggest import check_choice


def one_vs_rest_map(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Binary cross-entropy of every pixel, summed over the classes: (B, H, W), 0 where ignored.

    -log s(x_y) - sum_{c != y} log(1 - s(x_c)), s the sigmoid, y the label; written as
    sum_c log(1 + exp(x_c)) - x_y, which needs no one-hot labels.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) long in 0..K-1, or ``ignore_index``.
        ignore_index: label of the pixels that add nothing.

    Raises:
        ValueError: if the shapes disagree or a label has no channel.
    """
    if logits.dim() != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f'logits must be (B, K, H, W) and labels (B, H, W) of that size, '
            f'got {tuple(logits.shape)} and {tuple(labels.shape)}'
        )
    ignored = labels == ignore_index
    wrong = ((labels < 0) | (labels >= logits.shape[1])) & ~ignored
    if wrong.any():
        raise ValueError(
            f'labels must be in 0..{logits.shape[1] - 1} or ignore_index={ignore_index}, '
            f'got {labels[wrong].unique().tolist()}'
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = logits.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    # logsigmoid is exact where softplus turns into a straight line.
    return (-F.logsigmoid(-logits).sum(1) - own).masked_fill(ignored, 0)


def one_vs_rest(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """:func:`one_vs_rest_map`, the mean over the pixels that are not ignored (0 if all are).

    SSUL's released code divides so; other losses here divide by all pixels.
    """
    loss = one_vs_rest_map(logits, labels, ignore_index)
    return loss.sum() / (labels != ignore_index).sum().clamp(min=1)


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'mean': lambda loss, divisor: loss.sum() / divisor,
    'sum': lambda loss, divisor: loss.sum(),
    'none': lambda loss, divisor: loss,
}


@MODELS.register_module()
class OneVsRestLoss(nn.Module):
    """:func:`one_vs_rest` as the ``loss_decode`` of an mmseg head.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
    """

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_bce') -> None:
        super().__init__()
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
            label: (B, H, W) long.
            weight: (B, H, W), factor of each pixel.
            avg_factor: divisor in place of the number of pixels that are not ignored.
            reduction_override: ``'mean'`` (as None), ``'sum'``, or ``'none'`` for a (B, H, W) map.
            ignore_index: label of pixels that add nothing.

        Raises:
            ValueError: for shapes, labels or a reduction that do not fit.
        """
        reduction = 'mean' if reduction_override is None else reduction_override
        check_choice('reduction_override', reduction, _REDUCTIONS)
        loss = one_vs_rest_map(pred, label, ignore_index)
        if weight is not None:
            loss = loss * weight
        divisor = (label != ignore_index).sum().clamp(min=1) if avg_factor is None else avg_factor
        return self.loss_weight * _REDUCTIONS[reduction](loss, divisor)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}, loss_name={self._loss_name!r}'
