# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""BARM's losses: of a stage's residual of background, and of the old outputs before they are put together.

Zhang and Gao, "Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic
Segmentation", ECCV 2024, as in the released code. Labels are on the grid of the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.over_ranks import sum_over_ranks
from mmseg_sats.functional.precision import full_precision, working_dtype


def background_residual(residual: Tensor, labels: Tensor, num_old: int) -> tuple[Tensor, Tensor]:
    """The residual's losses where the stage has no label, and where it has one.

    Without a label, ``max(0, (1 - s)^2 - s^2)`` with s the residual's sigmoid: the distance to 1, less that to 0, so
    that the residual is positive there and lowers nothing. Under a label of a new class, BCE(residual, 0), so that it
    lowers background.

    Args:
        residual: (B, h, w) logits.
        labels: (B, h, w) long; labels below ``num_old``, pseudo-labels included, are without a label of the stage.
        num_old: the first label of a new class.

    Returns:
        Two scalars of at least float32: the means over the positions of either kind in the whole batch, 0 without any.
    """
    residual = residual.to(working_dtype(residual))
    scores = residual.sigmoid()
    losses = ((1 - scores).square() - scores.square()).clamp(min=0), F.softplus(residual)
    kinds = labels < num_old, (labels >= num_old) & (labels != 255)
    sums = [loss[where].sum() for loss, where in zip(losses, kinds, strict=True)]
    numbers = [where.sum().to(residual) for where in kinds]
    totals, counts = sum_over_ranks(torch.stack(sums + numbers)).chunk(2)
    old, new = totals / counts.clamp(min=1)
    return old, new


def output_distillation(outputs: Tensor, old_outputs: Tensor) -> Tensor:
    """BCE(outputs, the old model's sigmoids): a mean over positions, a sum over channels.

    Args:
        outputs: (B, N, h, w) logits.
        old_outputs: (B, N, h, w); they get no gradient.

    Raises:
        ValueError: the shapes disagree.
    """
    if outputs.shape != old_outputs.shape:
        raise ValueError(f'both models must have the same outputs, got {outputs.shape} and {old_outputs.shape}')
    dtype = working_dtype(outputs)
    with full_precision(outputs):
        target = old_outputs.detach().to(dtype).sigmoid()
        loss = F.binary_cross_entropy_with_logits(outputs.to(dtype), target, reduction='none')
    return loss.sum(1).mean()
