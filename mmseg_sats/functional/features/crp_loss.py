# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Distillation of class-region pooled attention (or features) from the old model to the new one.

Eq. (1) and (2) of Qiu et al., *SATS: Self-Attention Transfer for continual semantic Segmentation*
(Pattern Recognition 2023). With N images, block j with H_j heads, and C_ij the foreground classes
that image i has on the grid of block j:

    (1) f_ijch = mean of the attention vectors A_ijh(u, v) over the positions (u, v) of class c
    (2) L_a = mean_j 1/N sum_i 1/|C_ij| sum_c 1/H_j sum_h dist(f_new, f_old)

in the form of the authors' released code (``distance='l2'``, ``normalisation='per_block'``). The
paper's own form is ``'squared_l2'`` with ``'paper'``: 1/N sum_i 1/|C_i| sum_c 1/H_J sum_j sum_h
dist, where C_i are the classes that image i has on any block and H_J are the heads of the last
block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.functional.features.region_distances import (
    DISTANCES,
    POOLINGS,
    Block,
    BlockDistances,
    LabelGrids,
    grid_of,
)
from mmseg_sats.functional.precision import full_precision
from mmseg_sats.utils.spelling import choose


def crp_loss(
    student: Sequence[Block],
    teacher: Sequence[Block],
    labels: Tensor,
    *,
    pooling: str = 'class',
    distance: str = 'l2',
    normalisation: str = 'per_block',
    ignore_index: int = 255,
    num_labels: int | None = None,
    num_old: int | None = None,
) -> Tensor:
    """Distance between two models' class-region pooled attention or features, SATS eq. (1), (2).

    No attention map is built as a whole, and the old model gets no gradient. An image with no class
    adds 0 and still counts among the N images. Computed in at least float32, regardless of autocast.

    Args:
        student: the blocks of the new model, each an attention map (B, heads, L, S) or features
            (B, C, h, w). Features count as one head, and the vector at a position is its C channels.
        teacher: the blocks of the old model, of the same kinds and shapes.
        labels: (B, H, W) integer labels, resized to each block's grid by nearest neighbour; 0 is
            background.
        pooling: ``'class'``: the mean over each class region; ``'global'``: over all positions,
            background and ignore included; ``'none'``: no pooling, the mean over all positions of
            the distance.
        distance: ``'l2'``, whose gradient at 0 is taken as 0, ``'squared_l2'``, or ``'cosine'``, 1 minus
            the cosine of the two vectors.
        normalisation: ``'per_block'`` or ``'paper'``, see above; with ``'global'`` and ``'none'``
            an image counts as one class.
        ignore_index: the label that belongs to no class.
        num_labels: a number that all labels are below, if known. It saves one wait for the GPU; labels
            that are not used on any block's grid are then not checked.
        num_old: K_o. If given, labels from K_o on belong to no class, so that only the regions of old classes
            are compared; possible with ``pooling='class'`` alone.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: an argument's choice is unknown, the sequences differ in length or are empty, a
            block differs in kind or shape, the labels have another shape or type, or a label is negative
            or not below ``num_labels``.
    """
    if num_old is not None:
        check_masking(pooling)
        labels = without_new_classes(labels, num_old, ignore_index)
    grids = LabelGrids(labels, ignore_index, num_labels, [grid_of(block) for block in student])
    return crp_loss_of_grids(student, teacher, grids, pooling, distance, normalisation)


def check_masking(pooling: str) -> None:
    """Raises ValueError if new classes cannot be left out because there are no class regions."""
    if pooling != 'class':
        raise ValueError(f"new classes can be left out with pooling='class' alone, got pooling={pooling!r}")


def without_new_classes(labels: Tensor, num_old: int, ignore_index: int) -> Tensor:
    """Labels in which those from ``num_old`` on are ``ignore_index``."""
    return labels.masked_fill(labels >= num_old, ignore_index)


def crp_loss_of_grids(
    student: Sequence[Block],
    teacher: Sequence[Block],
    grids: LabelGrids,
    pooling: str,
    distance: str,
    normalisation: str,
) -> Tensor:
    """``crp_loss`` with given regions, which two sources may share or ``prepare`` may have computed already."""
    pool = choose('pooling', pooling, POOLINGS)
    measure = choose('distance', distance, DISTANCES)
    normalise = choose('normalisation', normalisation, NORMALISATIONS)
    _check_blocks(student, teacher, grids.labels)
    with full_precision(grids.labels):
        return normalise(
            [pool(new, old, grids, measure) for new, old in zip(student, teacher, strict=True)]
        )


def _per_block(blocks: Sequence[BlockDistances]) -> Tensor:
    """Eq. (2): the mean over heads and classes within a block, then over images and blocks."""
    divisors = [_classes(block.presence) * block.values.shape[1] for block in blocks]
    return _mean_over_images(blocks, torch.stack(divisors) * len(blocks))


def _paper(blocks: Sequence[BlockDistances]) -> Tensor:
    """The paper's sums: blocks and heads added up, divided by the last block's heads."""
    presence = torch.stack([block.presence for block in blocks]).any(0)
    return _mean_over_images(blocks, _classes(presence) * blocks[-1].values.shape[1])


NORMALISATIONS = {'per_block': _per_block, 'paper': _paper}


def _classes(presence: Tensor) -> Tensor:
    """|C_i|, (B,); 1 instead of 0 for an image with no class, whose distances are 0."""
    return presence.sum(1).clamp(min=1)


def _mean_over_images(blocks: Sequence[BlockDistances], divisors: Tensor) -> Tensor:
    """1/N sum_i of the distances of all blocks, divided by ``divisors`` (B,) or (blocks, B).

    An image with no class counts in N.
    """
    sums = torch.stack([block.values.sum((1, 2)) for block in blocks])
    factors = (divisors * sums.shape[1]).double().reciprocal()
    return (sums * factors.to(sums.device, sums.dtype, non_blocking=True)).sum()


def _check_blocks(student: Sequence[Block], teacher: Sequence[Block], labels: Tensor) -> None:
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            'student and teacher must have the same number of blocks, at least one,'
            f' got {len(student)} and {len(teacher)}'
        )
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(
            f'labels must be integers of shape (B, H, W), got {labels.dtype} {tuple(labels.shape)}'
        )
    for index, (new, old) in enumerate(zip(student, teacher, strict=True)):
        if _describe(new) != _describe(old):
            raise ValueError(
                f'block {index}: student and teacher must agree,'
                f' got {_describe(new)} and {_describe(old)}'
            )
        if new.shape[0] != len(labels):
            raise ValueError(
                f'block {index}: {new.shape[0]} images, but labels of shape {tuple(labels.shape)}'
            )


def _describe(block: Block) -> str:
    """The kind, shape and grid of a block as text; two blocks can be compared if these are equal.

    The two models' heads may have different dimensions d, since the attention has no such axis.
    """
    if isinstance(block, BaseAttentionMap):
        return block.describe()
    return f'features {tuple(block.shape)}'
