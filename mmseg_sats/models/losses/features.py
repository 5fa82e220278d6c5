# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Distillations of the encoder's features; ``mmseg_sats.functional`` has the functions of the same names."""

import math
from abc import abstractmethod
from collections.abc import Sequence

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.feature_mse import feature_mse
from mmseg_sats.functional.features.local_pod import fold_new_into_background, local_pod
from mmseg_sats.functional.features.pooled_cube import check_kernels, pooled_cube
from mmseg_sats.functional.pixels.means import check_distillation
from mmseg_sats.models.losses.blocks import block_indices, pick_blocks
from mmseg_sats.models.parts import DistillationPart, WeightedPart
from mmseg_sats.models.segmentor_output import SegmentorOutput


@MODELS.register_module()
class FeatureMSELoss(WeightedPart):
    """:func:`feature_mse` between student and old model.

    Args:
        blocks: indices of the encoder's blocks; by default the last of four, as published.
        loss_weight: factor of the loss: 100 published for ILT, 10 in the SATS comparison.

    Raises:
        ValueError: ``blocks`` is empty or has negative or repeated indices.
    """

    def __init__(self, blocks: Sequence[int] = (3,), loss_weight: float = 1.0) -> None:
        super().__init__(loss_weight)
        self.blocks = block_indices(blocks)

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; the labels are not used.

        Raises:
            ValueError: a block is out of range, or one of the errors of ``feature_mse``.
        """
        new = pick_blocks(student.features, self.blocks, 'student')
        old = pick_blocks(teacher.features, self.blocks, 'teacher')
        return self.loss_weight * feature_mse(new, old)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'blocks={self.blocks}, loss_weight={self.loss_weight}'


class _LayerDistillation(DistillationPart):
    """A distillation of the encoder's blocks and of the logits, whose weight grows with the share of old classes.

    The logits, at the head's resolution, are the last layer; the student's are first reduced to K_o channels by
    :func:`fold_new_into_background`. The loss is sqrt(K / (K - K_o)) times :meth:`distance`, with the student's
    channels K and the old model's channels K_o.

    Args:
        blocks: indices of the encoder's blocks.
        feature_weight: factor of each block of features.
        logits_weight: factor of the logits.

    Raises:
        ValueError: ``blocks`` is empty or has negative or repeated indices.
    """

    def __init__(self, blocks: Sequence[int], feature_weight: float, logits_weight: float) -> None:
        super().__init__()
        self.blocks = block_indices(blocks)
        self.feature_weight = feature_weight
        self.logits_weight = logits_weight

    @abstractmethod
    def distance(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The weighted distance of the blocks' features and, last, the logits; a scalar."""

    def weighted_mean(self, distances: Tensor) -> Tensor:
        """The mean over the layers of factor times distance, from the distances (J,) of all layers."""
        features, logits = distances[:-1].sum(), distances[-1]
        return (self.feature_weight * features + self.logits_weight * logits) / len(distances)

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; the labels are not used.

        Raises:
            ValueError: a block is out of range, the student has no new channel, or student and old model differ in
                the shape of a layer.
        """
        check_distillation(student.logits, teacher.logits)
        num_seen, num_old = student.logits.shape[1], teacher.logits.shape[1]
        if num_seen == num_old:
            raise ValueError(f'student and teacher both have {num_old} channels, expected new ones')
        folded = fold_new_into_background(student.logits, num_old)
        distance = self.distance(
            [*pick_blocks(student.features, self.blocks, 'student'), folded],
            [*pick_blocks(teacher.features, self.blocks, 'teacher'), teacher.logits],
        )
        return math.sqrt(num_seen / (num_seen - num_old)) * distance

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f'blocks={self.blocks}, feature_weight={self.feature_weight}, logits_weight={self.logits_weight}'
        )


@MODELS.register_module()
class LocalPODLoss(_LayerDistillation):
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
        super().__init__(blocks, feature_weight, logits_weight)
        self.scales = tuple(scales)

    def distance(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The mean over the layers of factor times distance, a scalar."""
        return self.weighted_mean(local_pod(student, teacher, self.scales))

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'{super().extra_repr()}, scales={self.scales}'


@MODELS.register_module()
class PooledCubeDistillationLoss(_LayerDistillation):
    """:func:`pooled_cube` on the encoder's features and on the logits, weighted as in the released code of RCIL.

    The loss is sqrt(K / (K - K_o)) times the sum of two means of factor times distance: that of the spatial
    distances over all layers, and that of the channel distances over the encoder's blocks. The logits, at the
    head's resolution, are the last layer; the student's are first reduced to K_o channels by
    :func:`fold_new_into_background`.

    Args:
        blocks: indices of the encoder's blocks.
        spatial_kernels: sides of the windows that are averaged over positions.
        channel_kernel: number of neighbouring channels that are averaged.
        feature_weight: factor of each block of features: 0.01 published for VOC, 5e-6 for ADE20K.
        logits_weight: factor of the logits: 0.0005 published for VOC, 5e-7 for ADE20K.

    Raises:
        ValueError: ``blocks`` is empty or has negative or repeated indices, or a kernel is less than 1.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (0, 1, 2, 3),
        spatial_kernels: Sequence[int] = (4, 8, 12, 16, 20, 24),
        channel_kernel: int = 3,
        feature_weight: float = 0.01,
        logits_weight: float = 0.0005,
    ) -> None:
        super().__init__(blocks, feature_weight, logits_weight)
        check_kernels(spatial_kernels, channel_kernel)
        self.spatial_kernels = tuple(spatial_kernels)
        self.channel_kernel = channel_kernel

    def distance(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The sum of the two weighted means, a scalar."""
        spatial, channel = pooled_cube(student, teacher, self.spatial_kernels, self.channel_kernel)
        return self.weighted_mean(spatial) + self.feature_weight * channel[:-1].mean()

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f'{super().extra_repr()}, spatial_kernels={self.spatial_kernels}, channel_kernel={self.channel_kernel}'
        )
