# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Images and masks of VOC's size, as many as wanted: real ones where they are, else drawn ones."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmseg_sats.datasets.preparation.voc import palette
from mmseg_sats.datasets.shapes.drawing import draw_scene

LONG_SIDE, SHORT_SIDE = 500, 375
SHARED = Path(os.environ.get('MMSEG_SATS_SHARED', Path(__file__).resolve().parents[2] / 'shared'))
VOC_MINI = Path(os.environ.get('VOC_MINI', SHARED / 'data/voc_mini'))
LIST = 'ImageSets/Segmentation/train.txt'


def make_pairs(folder: Path, distinct: int) -> list[Path]:
    """Writes images, masks and their list as VOC has them; returns the masks.

    Args:
        folder: the data root to be made.
        distinct: how many to take; fewer where voc_mini has not so many.
    """
    for name in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (folder / name).mkdir(parents=True)
    colours = palette().flatten().tolist()
    masks = []
    for image, labels in _pairs(distinct):
        name = f'{len(masks):06d}'
        cv2.imwrite(str(folder / f'JPEGImages/{name}.jpg'), image)
        mask = Image.fromarray(labels)
        mask.putpalette(colours)
        masks.append(folder / f'SegmentationClass/{name}.png')
        mask.save(masks[-1])
    (folder / LIST).write_text(''.join(f'{mask.stem}\n' for mask in masks))
    return masks


def repeat(masks: list[Path], folder: Path, number: int) -> list[str]:
    """``number`` files with names of their own: links to the masks, again and again."""
    folder.mkdir()
    files = [folder / f'{i:06d}.png' for i in range(number)]
    for index, file in enumerate(files):
        os.link(masks[index % len(masks)], file)
    return [str(file) for file in files]


def where_from() -> str:
    """What the pairs are made of, in words."""
    return f'{VOC_MINI}, enlarged' if VOC_MINI.is_dir() else 'drawn scenes (no voc_mini)'


def _pairs(distinct: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not VOC_MINI.is_dir():
        for index in range(distinct):
            yield tuple(part[:SHORT_SIDE] for part in draw_scene(index, image_size=LONG_SIDE))
        return
    for path in sorted((VOC_MINI / 'SegmentationClass').glob('*.png'))[:distinct]:
        labels = np.array(Image.open(path))
        scale = LONG_SIDE / max(labels.shape)
        size = tuple(round(side * scale) for side in labels.shape[::-1])
        image = cv2.imread(str(VOC_MINI / f'JPEGImages/{path.stem}.jpg'))
        yield cv2.resize(image, size), cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
