# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ILT's distillation of the encoder's features.

Michieli and Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation", ICCV Workshops
2019: the L2 distance of the two encoders' features, computed as a mean squared error as in the released code
of MiB.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.features.checks import check_features
from mmseg_sats.functional.precision import working_dtype


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
