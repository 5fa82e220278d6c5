# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the numbers in a data set's masks stand for, and which names mean background."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BACKGROUND_NAMES = (
    'background', '_background_', 'bg', 'void', 'other', 'unlabeled', 'unlabelled', 'null', 'clutter',
)  # fmt: skip


class Labels(NamedTuple):
    """Names, colours and numbers of a data set's classes.

    Args:
        names: by class id, background at 0.
        palette: colours by class id.
        numbers: number in the masks to class id; None: every number is its class.
        in_doubt: whether it is only assumed that label 0 is background, see :func:`check_background`.
    """

    names: tuple[str, ...]
    palette: list
    numbers: Mapping[int, int] | None
    in_doubt: bool = False


def is_background(name: str) -> bool:
    """Whether a class of this name is background, if it stands first."""
    return name.strip().lower() in BACKGROUND_NAMES


def check_background(labels: Labels, present: np.ndarray, where: str) -> None:
    """Refuses to take label 0 for background where it may as well be a class.

    A data set of n classes that does not name background has either the labels 0 to n - 1, one for each class
    (Cityscapes), or 1 to n beside the background 0. Only a mask with label n proves the second.

    Args:
        labels: what is known without the masks.
        present: (256,) bool, which numbers any mask holds.
        where: the data set's name.

    Raises:
        ValueError: label 0 may be a class; the message says how to tell.
    """
    first, last = labels.names[1], len(labels.names) - 1
    if not labels.in_doubt or present[last]:
        return
    numbers = f'mask_values=dict({first}=..., ...)'
    raise ValueError(
        f'{where}: is label 0 background or {first!r}, the first of its {last} classes? No mask holds label {last}, '
        f'so {first!r} would silently become background. Expected background={first!r} if that is meant, '
        f'no_background=True if label 0 is a class to learn like the others (docs/own_data.md, "Data without '
        f'background"), or the numbers in the masks, {numbers}, where 0 is background unless a class has it'
    )


def hint_on_binary_masks(present: np.ndarray, names: Sequence[str]) -> str:
    """What to do about masks of 0 and 255 alone, the usual form of masks of one class; '' for others.

    Args:
        present: (256,) bool, which numbers any mask holds, 255 being ignored.
        names: the classes' names, background first.
    """
    if not present[255] or present[1:255].any():
        return ''
    return (
        '. The masks hold 0 and 255 alone, and 255 is ignored: if 255 is a class, expected its number, such as '
        f'mask_values=dict({names[-1]}=255)'
    )
