# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ILT's distillation of the encoder's features.

Michieli and Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation", ICCV Workshops
2019: the L2 distance of the two encoders' features, computed as a mean squared error as in the released code
of MiB.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.losses.blocks import block_indices, check_features, pick_blocks
from mmseg_sats.models.parts import DistillationPart
from mmseg_sats.models.precision import working_dtype
from mmseg_sats.models.segmentor_output import SegmentorOutput


def feature_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean squared error of each block's features, averaged over the blocks.

    Args:
        student: features (B, C_j, h_j, w_j) of the new model's blocks.
        teacher: the old model's features, of the same shapes. They get no gradient.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: the sequences differ in length or are empty, or a block differs in shape.
    """
    check_features(student, teacher)
    losses = []
    for new, old in zip(student, teacher, strict=True):
        dtype = working_dtype(new, old)
        losses.append(F.mse_loss(new.to(dtype), old.detach().to(dtype)))
    return torch.stack(losses).mean()


@MODELS.register_module()
class FeatureMSELoss(DistillationPart):
    """:func:`feature_mse` between student and old model.

    Args:
        blocks: indices of the encoder's blocks; by default the last of four, as published.
        loss_weight: factor of the loss: 100 published for ILT, 10 in the SATS comparison.

    Raises:
        ValueError: ``blocks`` is empty or has negative or repeated indices.
    """

    def __init__(self, blocks: Sequence[int] = (3,), loss_weight: float = 1.0) -> None:
        super().__init__()
        self.blocks = block_indices(blocks)
        self.loss_weight = loss_weight

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
