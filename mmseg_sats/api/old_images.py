# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Images of the old classes to be replayed: their masks are written with the numbers of the new masks."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from mmseg_sats.api.class_table import BACKGROUND, IGNORED, ClassTable
from mmseg_sats.api.folders import MaskedImages, masked_images
from mmseg_sats.api.old_model import OldModel, old_dataset
from mmseg_sats.datasets.class_index.mask_scan import read_labels, scan_masks
from mmseg_sats.datasets.memory.selection import Candidates, ClassBalancedMemory
from mmseg_sats.utils.checkpoint import write_atomically

Pairs = Sequence[tuple[str, str]]


def picked_old_images(old: OldModel, size: int) -> Pairs:
    """Image and mask of some of the old model's own training images, evenly over its classes, the same ones each time.

    Args:
        old: its config names the data.
        size: how many.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: ``size`` is smaller than the number of classes.
    """
    if size < len(old.classes):
        raise ValueError(f'memory {size}: expected at least one image for each of {len(old.classes)} old classes')
    dataset = old_dataset(old)
    infos = [dataset.get_data_info(row) for row in range(len(dataset))]
    present = np.unpackbits(scan_masks([info['seg_map_path'] for info in infos]), axis=1).astype(bool)
    holds = present[:, [old.numbers[name] for name in old.classes]]
    rows, _ = ClassBalancedMemory(size, seed=0).select(Candidates(holds, np.zeros(0, np.int64)), 0)
    return [(infos[row]['img_path'], infos[row]['seg_map_path']) for row in sorted(rows.tolist())]


def write_old_images(pairs: Pairs, numbers: Mapping[str, int], table: ClassTable, folder: Path) -> MaskedImages:
    """Copies images, and writes their masks with the numbers of :meth:`ClassTable.numbers_for_all`.

    Args:
        pairs: image and mask of each.
        numbers: name (the table's) to number in these masks. 0 is background if no class has it, 255 is ignored.
        table: the classes.
        folder: where ``images`` and ``masks`` are made. It keeps what is replayed, so that the run can be repeated.

    Raises:
        ValueError: a mask holds a number without a name, or an image lies in ``folder``, which is emptied.
    """
    new_numbers = table.numbers_for_all()
    known, through = np.zeros(256, bool), np.zeros(256, np.uint8)
    for number, name in {255: IGNORED, 0: BACKGROUND, **{number: name for name, number in numbers.items()}}.items():
        known[number], through[number] = True, new_numbers[name]
    images, masks = folder / 'images', folder / 'masks'
    inside = [one for pair in pairs for one in pair if Path(one).resolve().is_relative_to(folder.resolve())]
    if inside:
        raise ValueError(f'{inside[0]} lies in {folder}, which is made anew: expected old images elsewhere')
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier, interrupted attempt
    images.mkdir(parents=True)
    masks.mkdir()
    for place, (image, mask) in enumerate(track(pairs, description='old images', console=Console(stderr=True))):
        labels = read_labels(mask)
        strange = np.unique(labels[~known[labels]]).tolist()
        if strange:
            raise ValueError(
                f'{mask} holds the numbers {strange}, which old_classes does not name; known are '
                f'{dict(numbers)}, 0 for background and 255 for ignored pixels'
            )
        name = f'{place:05}_{Path(image).stem}'  # images of several folders may have the same name
        shutil.copyfile(image, images / f'{name}{Path(image).suffix}')
        png = cv2.imencode('.png', through[labels])[1].tobytes()
        write_atomically(masks / f'{name}.png', lambda file, png=png: file.write(png))
    return masked_images(images, masks)
