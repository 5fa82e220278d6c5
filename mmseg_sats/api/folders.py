# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Folders of images with masks: what is in them, which numbers their masks hold, and a split for evaluation."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmseg_sats.api.class_table import BACKGROUND
from mmseg_sats.datasets.class_index.mask_scan import scan_masks
from mmseg_sats.datasets.folder import FolderDataset
from mmseg_sats.utils.checkpoint import write_text

_HELD_OUT = 5  # every fifth image is kept for evaluation


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """Images and their masks.

    Args:
        images: the folder of images, absolute.
        masks: the folder of masks, absolute.
        pairs: the files of each image and its mask.
        presence: (N, 256) bool: which numbers each mask holds.
        list_file: a file with the names of the images that are used; '' for all of the folder.
    """

    images: str
    masks: str
    pairs: tuple[tuple[str, str], ...]
    presence: np.ndarray
    list_file: str = ''

    def __len__(self) -> int:
        return len(self.pairs)

    def showing(self, numbers: Iterable[int]) -> np.ndarray:
        """(N,) bool: the images whose masks hold one of the numbers."""
        return self.presence[:, list(numbers)].any(axis=1)

    def only(self, rows: Sequence[int], list_file: Path) -> 'MaskedImages':
        """Some of the images, whose names are written to ``list_file``."""
        pairs = tuple(self.pairs[row] for row in rows)
        names = [Path(image).relative_to(self.images).with_suffix('').as_posix() for image, _ in pairs]
        list_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(list_file, ''.join(f'{name}\n' for name in names))
        return MaskedImages(self.images, self.masks, pairs, self.presence[rows], str(list_file.resolve()))


def masked_images(images: str | Path, masks: str | Path) -> MaskedImages:
    """All images of a folder with their masks, ``sub/name.png`` for ``sub/name.jpg``.

    Raises:
        FileNotFoundError: a folder or a mask is missing.
        ValueError: there is no image, or a mask cannot be read.
    """
    folders = dict(img_path=str(Path(images).resolve()), seg_map_path=str(Path(masks).resolve()))
    dataset = FolderDataset(classes=(BACKGROUND,), data_prefix=folders, pipeline=[])
    infos = [dataset.get_data_info(row) for row in range(len(dataset))]
    if not infos:
        raise ValueError(f'{images} holds no image')
    pairs = tuple((info['img_path'], info['seg_map_path']) for info in infos)
    packed = scan_masks([mask for _, mask in pairs])
    presence = np.unpackbits(packed, axis=1).astype(bool)
    return MaskedImages(folders['img_path'], folders['seg_map_path'], pairs, presence)


def hold_out(images: MaskedImages, folder: Path) -> tuple[MaskedImages, MaskedImages]:
    """Splits images into those for training and every fifth for evaluation, the same ones each time.

    Fewer than ten images are used for both, since nothing would be left to learn from.

    Args:
        images: all images.
        folder: where ``train.txt`` and ``val.txt``, the names of both, are written.
    """
    if len(images) < 2 * _HELD_OUT:
        return images, images
    order = random.Random(0).sample(range(len(images)), len(images))
    kept = sorted(order[: len(images) // _HELD_OUT])
    rest = sorted(order[len(images) // _HELD_OUT :])
    return images.only(rest, folder / 'train.txt'), images.only(kept, folder / 'val.txt')
