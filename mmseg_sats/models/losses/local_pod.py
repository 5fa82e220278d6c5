# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""PLOP's local POD: distillation of features pooled along the rows and columns of cells of several sizes.

Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021,
section 3.2, with the square before pooling, the factors and the schedule of their released code. Their
layers also include the decoder's last features; here they are the encoder's blocks and the logits.
"""

import math
from collections.abc import Sequence

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.losses.blocks import block_indices, check_features, pick_blocks
from mmseg_sats.models.parts import DistillationPart
from mmseg_sats.models.pixel_losses.base import check_distillation
from mmseg_sats.models.precision import full_precision, working_dtype
from mmseg_sats.models.segmentor_output import SegmentorOutput


def local_pod(
    student: Sequence[Tensor], teacher: Sequence[Tensor], scales: Sequence[int] = (1, 2, 4)
) -> Tensor:
    """Distance of two models' squared features, averaged along rows and columns of cells.

    At scale s, a map is cut into s x s cells. In each cell, the mean of each row and of each column is
    computed. The means of all channels, cells and scales form the vector of an image. If a side is not a
    multiple of s, its first cells are longer by one; no position is left out or used twice.

    Args:
        student: features (B, C_j, h_j, w_j) of the new model's layers.
        teacher: the old model's features, of the same shapes. They get no gradient.
        scales: the numbers of cells along a side.

    Returns:
        (J,), for each layer the mean over the images of the L2 distance of the two vectors, in at least
        float32. The gradient of the distance at 0 is 0.

    Raises:
        ValueError: the sequences differ in length or are empty, a layer differs in shape, or a scale is
            less than 1.
    """
    check_features(student, teacher)
    if not scales or min(scales) < 1:
        raise ValueError(f'scales must be numbers of cells a side, from 1 on, got {scales}')
    with full_precision(student[0]):
        return torch.stack(
            [_layer(new, old.detach(), scales) for new, old in zip(student, teacher, strict=True)]
        )


def _layer(student: Tensor, teacher: Tensor, scales: Sequence[int]) -> Tensor:
    dtype = working_dtype(student, teacher)
    # Averaging is linear, so the difference can be pooled instead of both maps.
    difference = student.to(dtype).square() - teacher.to(dtype).square()
    height, width = difference.shape[2:]
    rows = difference @ _strips(width, scales, difference).mT
    columns = _strips(height, scales, difference) @ difference
    pooled = torch.cat([rows.flatten(1), columns.flatten(1)], 1)
    # The derivative of vector_norm at 0 is 0, where sqrt(sum of squares) would give NaN.
    return torch.linalg.vector_norm(pooled, dim=1).mean()


def _strips(length: int, scales: Sequence[int], like: Tensor) -> Tensor:
    """A matrix (S, length) that averages over the cells along a side, for all scales; empty cells are left out."""
    parts = [
        part
        for scale in scales
        for part in torch.eye(length, dtype=like.dtype, device=like.device).tensor_split(scale)
        if len(part)
    ]
    return torch.stack([part.mean(0) for part in parts])


def fold_new_into_background(logits: Tensor, num_old: int) -> Tensor:
    """Adds the new channels of logits (B, K, h, w) to background's channel and returns (B, K_o, h, w)."""
    background = logits[:, :1] + logits[:, num_old:].sum(1, keepdim=True)
    return torch.cat([background, logits[:, 1:num_old]], 1)


@MODELS.register_module()
class LocalPODLoss(DistillationPart):
    """:func:`local_pod` on the encoder's features and on the logits, weighted as in PLOP.

    The loss is sqrt(K / (K - K_o)) times the mean over the layers of factor times distance, with the
    student's channels K and the old model's channels K_o. The logits, at the head's resolution, are the
    last layer; the student's are first reduced to K_o channels by :func:`fold_new_into_background`.

    Args:
        blocks: indices of the encoder's blocks.
        scales: the numbers of cells along a side.
        feature_weight: factor of each block of features.
        logits_weight: factor of the logits.

    Raises:
        ValueError: ``blocks`` is empty or has negative or repeated indices.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (0, 1, 2, 3),
        scales: Sequence[int] = (1, 2, 4),
        feature_weight: float = 0.01,
        logits_weight: float = 0.0005,
    ) -> None:
        super().__init__()
        self.blocks = block_indices(blocks)
        self.scales = tuple(scales)
        self.feature_weight = feature_weight
        self.logits_weight = logits_weight

    def forward(
        self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor
    ) -> Tensor:
        """The weighted loss, a scalar; the labels are not used.

        Raises:
            ValueError: a block is out of range, the student has no new channel, or one of the errors of
                ``local_pod``.
        """
        check_distillation(student.logits, teacher.logits)
        num_seen, num_old = student.logits.shape[1], teacher.logits.shape[1]
        if num_seen == num_old:
            raise ValueError(f'student and teacher both have {num_old} channels, expected new ones')
        folded = fold_new_into_background(student.logits, num_old)
        distances = local_pod(
            [*pick_blocks(student.features, self.blocks, 'student'), folded],
            [*pick_blocks(teacher.features, self.blocks, 'teacher'), teacher.logits],
            self.scales,
        )
        schedule = math.sqrt(num_seen / (num_seen - num_old))
        features, logits = distances[:-1].sum(), distances[-1]
        total = self.feature_weight * features + self.logits_weight * logits
        return schedule * total / len(distances)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f'blocks={self.blocks}, scales={self.scales}, feature_weight={self.feature_weight}, '
            f'logits_weight={self.logits_weight}'
        )
