# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The check of two models' features."""

from collections.abc import Sequence

from torch import Tensor


def check_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises ValueError unless both have the same number, at least one, of (B, C_j, h_j, w_j) of the same shapes."""
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            'student and teacher must have the same number of features, at least one,'
            f' got {len(student)} and {len(teacher)}'
        )
    for index, (new, old) in enumerate(zip(student, teacher, strict=True)):
        if new.dim() != 4 or new.shape != old.shape:
            raise ValueError(
                f'features {index}: student and teacher must both be (B, C, h, w),'
                f' got {tuple(new.shape)} and {tuple(old.shape)}'
            )
