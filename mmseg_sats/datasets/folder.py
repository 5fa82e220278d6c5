# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Anybody's data: a folder of images, a folder of masks, and what the masks' numbers mean."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from mmseg_sats.datasets.class_index.label_numbers import is_background
from mmseg_sats.utils.spelling import near_match

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
BACKGROUND = 'background'
IGNORED = 255
BLACK = (0, 0, 0)
IGNORED_COLOUR = (224, 224, 192)  # VOC's own, in which pictures show ignored pixels


@DATASETS.register_module()
class FolderDataset(BaseSegDataset):
    """Images of folders with the masks of others, which may number their classes in their own way.

    An image ``sub/name.jpg`` has the mask ``sub/name.png``; all usual image formats may be mixed.

    Args:
        classes: All names, background first, then the classes in the order in which they are
            learned: class i of a protocol is ``classes[i]``.
        data_root: In front of the two folders below.
        data_prefix: ``img_path`` and ``seg_map_path``, the two folders.
        more_folders: Pairs of further folders (images, masks), whose masks use the same numbers; below
            ``data_root``, as the two above.
        mask_values: Name to number in the masks, for the classes that occur in these masks. Background
            is 0 where that is nobody's number; 255 is ignored unless it has a name. None or empty: class i has
            number i.
        palette: A colour (r, g, b) for each class; by default :func:`distinct_colours`.
        ignore_values: Numbers in the masks that stand for ignored pixels, beside 255.
        ann_file: A list of the names to use of the first folder, without suffix; all images by default.
        img_suffix: What every image's name ends with, and its mask's name is without; by default any of the
            usual suffixes.
        seg_map_suffix: What a mask has in the place of its image's suffix.
        **options: As in mmseg's ``BaseSegDataset``, which refuses others.

    Raises:
        ValueError: If names or numbers are impossible.
        FileNotFoundError: If a folder, a listed image or a mask is missing, when the list is read.

    Attributes:
        label_ids: What each number in the masks stands for, number to class; None: itself.
    """

    def __init__(
        self,
        classes: Sequence[str],
        data_root: str | None = None,
        data_prefix: Mapping[str, str] | None = None,
        mask_values: Mapping[str, int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        ignore_values: Sequence[int] = (),
        ann_file: str = '',
        img_suffix: str | None = None,
        seg_map_suffix: str = '.png',
        more_folders: Sequence[tuple[str, str]] = (),
        **options: Any,
    ) -> None:
        classes = tuple(classes)
        _check_names(classes)
        self.label_ids = None
        if not isinstance(ignore_values, list | tuple):
            raise ValueError(f'ignore_values={ignore_values!r}: expected a list of numbers')
        if mask_values or ignore_values:
            own = {name: i for i, name in enumerate(classes) if i not in ignore_values}
            values = mask_values or own
            self.label_ids = label_ids(classes, values, ignore_values)
        self.image_suffix = img_suffix
        self.more_folders = [tuple(os.path.join(data_root or '', one) for one in pair) for pair in more_folders]
        palette = distinct_colours(len(classes)) if palette is None else palette
        metainfo: dict[str, Any] = dict(classes=classes, palette=[list(colour) for colour in palette])
        super().__init__(
            metainfo=metainfo,
            data_root=data_root,
            data_prefix=dict(data_prefix or dict(img_path='images', seg_map_path='masks')),
            ann_file=ann_file,
            seg_map_suffix=seg_map_suffix,
            **options,
        )

    def full_init(self) -> None:
        """Reads the list of images, each of which must have its mask."""
        if self._fully_initialized:
            return
        super().full_init()
        for folder in (self.data_prefix['seg_map_path'], *(masks for _, masks in self.more_folders)):
            if not os.path.isdir(folder):
                raise FileNotFoundError(f'the folder of masks {folder} does not exist')
        masks = [self.get_data_info(i)['seg_map_path'] for i in range(len(self))]
        missing = [mask for mask in masks if not os.path.isfile(mask)]
        if missing:
            raise FileNotFoundError(
                f'{len(missing)} of {len(masks)} images in {self._folders()} have no '
                f'mask; expected {_some(missing)}'
            )

    def _folders(self) -> str:
        return ' and '.join(str(folder) for folder in (self.data_prefix['img_path'], *dict(self.more_folders)))

    def load_data_list(self) -> list[dict]:
        """One entry per image, sorted by path, with the mask that it should have."""
        images = _images_by_name(Path(self.data_prefix['img_path']), self.image_suffix)
        if self.ann_file:
            images = _listed(images, Path(self.ann_file))
        rows = self._rows(images, self.data_prefix['seg_map_path'])
        for folder, masks in self.more_folders:
            rows += self._rows(_images_by_name(Path(folder), self.image_suffix), masks)
        return rows

    def _rows(self, images: Mapping[str, Path], masks: str) -> list[dict]:
        return [
            dict(
                img_path=str(image),
                seg_map_path=str(Path(masks, f'{name}{self.seg_map_suffix}')),
                label_map=self.label_map,
                reduce_zero_label=self.reduce_zero_label,
                seg_fields=[],
            )
            for name, image in images.items()
        ]


def distinct_colours(
    count: int, beside: Sequence[Sequence[int]] = (BLACK,)
) -> list[tuple[int, int, int]]:
    """Colours that can be told apart: each is the one that is farthest, as people see it, from those before it.

    Args:
        count: How many, those of ``beside`` included.
        beside: Colours RGB 0..255 that are there already, and come first; by default background's black.

    Returns:
        RGB 0..255, the same for the same arguments.
    """
    steps = np.arange(0, 256, 51)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing='ij'), -1).reshape(-1, 3)
    colours = [tuple(int(value) for value in colour) for colour in beside]
    places = _lab(candidates)
    # Neither black nor the pale colour of ignored pixels is for a class, nor what is as dark or as pale.
    taken = _lab(np.array([*colours, BLACK, IGNORED_COLOUR]))
    nearest = np.linalg.norm(places[:, None] - taken, axis=-1).min(1)
    nearest[(places[:, 0] < 35) | (places[:, 0] > 88)] = -1
    while len(colours) < count:
        best = int(nearest.argmax())
        colours.append(tuple(int(value) for value in candidates[best]))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[best], axis=-1))
    return colours


def _lab(colours: np.ndarray) -> np.ndarray:
    """RGB (N, 3) in CIE Lab, in which distances are about those that people see."""
    return cv2.cvtColor((colours[None] / 255).astype(np.float32), cv2.COLOR_RGB2Lab)[0]


def label_ids(
    classes: Sequence[str], mask_values: Mapping[str, int], ignore_values: Sequence[int] = ()
) -> dict[int, int]:
    """Number in a mask to class id, 255 for those that are ignored.

    Args:
        classes: Names by class id, background first.
        mask_values: Name to number; classes without one do not occur in the masks.
        ignore_values: Numbers of ignored pixels.

    Raises:
        ValueError: An unknown name, a number outside 0..255, or one number for two names.
    """
    ids: dict[int, int] = {}
    for name, value in mask_values.items():
        if name not in classes:
            raise ValueError(
                f'mask_values names {name!r}, which is no class{near_match(name, classes)}; '
                f'expected some of {list(classes)}'
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
            raise ValueError(f'mask_values[{name!r}] is {value!r}, expected a number in 0..255')
        if value in ids:
            raise ValueError(
                f'mask_values gives {value} to {classes[ids[value]]!r} and to {name!r}'
            )
        ids[value] = classes.index(name)
    for value in ignore_values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
            raise ValueError(f'ignore_values has {value!r}, expected numbers in 0..255')
        if value in ids and ids[value] != IGNORED:
            raise ValueError(f'ignore_values has {value}, which is {classes[ids[value]]!r} by mask_values')
        ids[value] = IGNORED
    if 0 not in ids.values():  # background's own number was not given
        ids.setdefault(0, 0)
    return ids


def _check_names(classes: Sequence[str]) -> None:
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if not classes or not is_background(classes[0]) or repeated:
        found = f'{repeated} twice' if repeated else f'{list(classes[:3])} ...'
        raise ValueError(
            f'classes of FolderDataset are {BACKGROUND!r} and then a name for each class, all '
            f'different; got {found}. Where 0 in the masks is a class, mask_values gives it that number'
        )


def _images_by_name(folder: Path, suffix: str | None) -> dict[str, Path]:
    """The images below a folder by their path in it without suffix (any usual one for None), sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f'the folder of images {folder} does not exist')
    images: dict[str, Path] = {}
    for path in sorted(folder.rglob('*')):
        own = path.suffix if suffix is None else suffix
        wanted = path.suffix.lower() in IMAGE_SUFFIXES if suffix is None else path.name.endswith(own)
        if wanted:
            name = path.relative_to(folder).as_posix().removesuffix(own)
            if name in images:
                raise ValueError(f'{images[name]} and {path} would share a mask')
            images[name] = path
    return images


def _listed(images: Mapping[str, Path], list_file: Path) -> dict[str, Path]:
    """The images that a list names, in its order."""
    names = [line.strip() for line in list_file.read_text(encoding='utf-8-sig').splitlines()]
    names = [name for name in names if name]
    missing = [name for name in names if name not in images]
    if missing:
        raise FileNotFoundError(
            f'{list_file} names {len(missing)} images that are not there: {_some(missing)}'
        )
    return {name: images[name] for name in names}


def _some(names: Sequence[str], most: int = 5) -> str:
    more = '' if len(names) <= most else f' and {len(names) - most} more'
    return ', '.join(names[:most]) + more
