# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Somebody else's data and model, as docs/own_data.md takes them: made out of any image and mask pairs."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs/own_data.md'


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The indented lines of a page that start a command, continued lines joined."""
    text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
    return re.findall(r'^ {4}((?:[A-Z_]+=\S+ )*(?:mmseg-sats|python|bash|make|pip)\b .*)$', text, re.M)


def lay_out(folder: Path) -> Path:
    """A folder where the page's commands run as they stand; ``yard.py`` in it is the page's config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'old').mkdir()
    (folder / 'yard.py').write_text(code_blocks(PAGE, 'python')[0])
    return folder


def write_split(
    pairs: Sequence[tuple[Path, Path]],
    values: Mapping[int, int],
    folder: Path,
    split: str,
    new: set[int],
) -> int:
    """Copies the images that show a class of ``new`` to rgb/, with masks of other numbers in labels/.

    Args:
        pairs: images and masks.
        values: number in the given masks to number in the written ones; others become 0.
        folder: the data root.
        split: ``'train'`` or ``'val'``.
        new: the numbers of which an image must show one.

    Returns:
        How many images were taken.
    """
    table = np.zeros(256, np.uint8)
    table[255] = 255
    for old, value in values.items():
        table[old] = value
    for part in ('rgb', 'labels'):
        (folder / part / split).mkdir(parents=True, exist_ok=True)
    taken = 0
    for image, mask in pairs:
        labels = read_mask(mask)
        if new & set(np.unique(labels).tolist()):
            shutil.copy(image, folder / 'rgb' / split)
            cv2.imwrite(str(folder / 'labels' / split / f'{image.stem}.png'), table[labels])
            taken += 1
    return taken


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8, palette masks by index."""
    return mmcv.imread(str(path), flag='unchanged', backend='pillow')
