# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Deals each training image to one of the classes that it shows: the setting ``'partitioned'``."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def deal(presence: np.ndarray, images: Sequence[str], classes: Sequence[int]) -> np.ndarray:
    """Deals images to classes, as evenly as what they show allows.

    Images that show fewer classes come first, among equals in the order of the SHA-256 of their names (paths below
    the deepest folder that holds all, with forward slashes). Each goes to that of its classes which has the fewest
    images so far, among equals to the one with the lowest id. So the deal depends on names and labels alone: not on
    the order of the list, the protocol, the order of the classes, a seed, or the machine.

    Args:
        presence: (N, L) bool, whether image n holds label l.
        images: paths of the N images, all different.
        classes: ids of the foreground classes, labels below L.

    Returns:
        (N,) int64: the class of each image, 0 for one that shows none.
    """
    ids = np.sort(np.asarray(classes, dtype=np.int64))
    shown = presence[:, ids]
    keys = _hashes(images)
    order = sorted(range(len(shown)), key=lambda row: (int(shown[row].sum()), keys[row]))
    counts = np.zeros(len(ids), dtype=np.int64)
    dealt = np.zeros(len(shown), dtype=np.int64)
    for row in order:
        places = np.flatnonzero(shown[row])
        if places.size:
            place = places[counts[places].argmin()]
            counts[place] += 1
            dealt[row] = ids[place]
    return dealt


def _hashes(images: Sequence[str]) -> list[bytes]:
    paths = [os.path.abspath(image) for image in images]
    root = os.path.commonpath([os.path.dirname(path) for path in paths] or [os.sep])
    names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return [hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest() for name in names]
