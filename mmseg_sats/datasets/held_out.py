# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which training images are held out for choosing an epoch or a value."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def held_out(names: Sequence[str], share: float) -> np.ndarray:
    """Marks names at equal distances in their sorted order, starting with the first.

    Args:
        names: of N images, all different.
        share: part of them that is held out, between 0 and 1.

    Returns:
        (N,) bool, true for ``ceil(share * N)`` of them.

    Raises:
        ValueError: an impossible share.
    """
    check_share(share)
    exact = Fraction(share).limit_denominator(10**6)  # 0.2 is a fifth, whatever its last bit
    steps = np.arange(len(names) + 1, dtype=np.int64) * exact.numerator
    marks = np.diff(-(-steps // exact.denominator)) > 0
    order = sorted(range(len(names)), key=names.__getitem__)
    result = np.zeros(len(names), dtype=bool)
    result[order] = marks
    return result


def check_share(share: float | None) -> None:
    """Refuses a share that is no number between 0 and 1; None holds nothing out.

    Raises:
        ValueError: the share.
    """
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if share is not None and not (number and 0 < share < 1):
        raise ValueError(
            f'held_out={share!r}: expected the share of the training images that is held out, '
            'between 0 and 1, or None'
        )
