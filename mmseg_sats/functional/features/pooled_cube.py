# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""RCIL's pooled cube distillation: squared features averaged over windows of positions, and over neighbouring channels.

Zhang et al., "Representation Compensation Networks for Continual Semantic Segmentation", CVPR 2022, with the
square, the kernels, the strides and the padding of their released code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.features.checks import check_features
from mmseg_sats.functional.precision import full_precision, working_dtype


def pooled_cube(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    spatial_kernels: Sequence[int] = (4, 8, 12, 16, 20, 24),
    channel_kernel: int = 3,
) -> tuple[Tensor, Tensor]:
    """Distances of two models' squared features, averaged over windows of positions and over windows of channels.

    All windows have stride 1. The map is padded by half a window of zeros on both sides, which count in the average,
    so that a window may be larger than the map.

    Args:
        student: features (B, C_j, h_j, w_j) of the new model's layers.
        teacher: the old model's features, of the same shapes. They get no gradient.
        spatial_kernels: sides k of the windows of k x k positions.
        channel_kernel: number of channels in a window of channels.

    Returns:
        (J,) and (J,): for each layer the mean over the images of the L2 norm of the difference of the averages. The
        first is over positions, its mean over the kernels; the second is over channels. At least float32. The
        gradient of a norm at 0 is 0.

    Raises:
        ValueError: the sequences differ in length or are empty, a layer differs in shape, or a kernel is less than 1.
    """
    check_features(student, teacher)
    check_kernels(spatial_kernels, channel_kernel)
    with full_precision(student[0]):
        # Averaging is linear, so the difference of the squares can be pooled instead of both maps.
        differences = [_difference_of_squares(*pair) for pair in zip(student, teacher, strict=True)]
        spatial = [
            torch.stack([_norm(_pool_positions(d, kernel)) for kernel in spatial_kernels]).mean() for d in differences
        ]
        channel = [_norm(_pool_rows(d.flatten(2), channel_kernel)) for d in differences]
    return torch.stack(spatial), torch.stack(channel)


def check_kernels(spatial_kernels: Sequence[int], channel_kernel: int) -> None:
    """Raises ValueError unless there are spatial kernels and all kernels are at least 1."""
    if not spatial_kernels or min(spatial_kernels) < 1 or channel_kernel < 1:
        raise ValueError(
            'spatial_kernels and channel_kernel must be sizes of windows, from 1 on, '
            f'got {spatial_kernels} and {channel_kernel}'
        )


def _difference_of_squares(new: Tensor, old: Tensor) -> Tensor:
    dtype = working_dtype(new, old)
    return new.to(dtype).square() - old.detach().to(dtype).square()


def _pool_positions(values: Tensor, kernel: int) -> Tensor:
    """Averages over windows of kernel x kernel positions; first along columns, then along rows, which is faster."""
    return F.avg_pool2d(_pool_rows(values, kernel), (1, kernel), stride=1, padding=(0, kernel // 2))


def _pool_rows(values: Tensor, kernel: int) -> Tensor:
    """Averages over neighbours along the last axis but one."""
    return F.avg_pool2d(values, (kernel, 1), stride=1, padding=(kernel // 2, 0))


def _norm(pooled: Tensor) -> Tensor:
    # The derivative of vector_norm at 0 is 0, where sqrt(sum of squares) would give NaN.
    return torch.linalg.vector_norm(pooled.flatten(1), dim=1).mean()
