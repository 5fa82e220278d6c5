# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A split of the training images, on which values are chosen so that the validation images stay unseen."""

from pathlib import Path

import numpy as np

from mmseg_sats.datasets.held_out import held_out
from mmseg_sats.utils.checkpoint import write_text

SHARE = 0.2


def write_split(train_list: Path, folder: Path) -> tuple[int, int]:
    """Every fifth name of a list, sorted, goes into ``held.txt``, the rest into ``fit.txt``.

    Args:
        train_list: a list of names, one a line.
        folder: where the two lists go.

    Returns:
        How many names are in ``fit.txt`` and in ``held.txt``.

    Raises:
        FileNotFoundError: there is no such list.
    """
    if not train_list.is_file():
        raise FileNotFoundError(f'{train_list}: no such list of training images')
    names = sorted(train_list.read_text().split())
    held = held_out(names, SHARE)
    folder.mkdir(parents=True, exist_ok=True)
    for file, marks in (('held.txt', held), ('fit.txt', ~held)):
        write_text(folder / file, '\n'.join(np.array(names)[marks]) + '\n')
    return int((~held).sum()), int(held.sum())
