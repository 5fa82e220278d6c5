# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""PLOP's local POD: distillation of features pooled along the rows and columns of cells of several sizes.

Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021,
section 3.2, with the square before pooling, the factors and the schedule of their released code. Their
layers also include the decoder's last features; here they are the encoder's blocks and the logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmseg_sats.functional.features.checks import check_features
from mmseg_sats.functional.precision import full_precision, working_dtype


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
