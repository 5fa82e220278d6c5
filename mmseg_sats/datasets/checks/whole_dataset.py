# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Lists all faults of a data set, and counts images and pixels of each class in each stage."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmseg_sats.datasets.checks.image_sizes import PairSizes, check_decodes
from mmseg_sats.datasets.class_index.deal import deal
from mmseg_sats.datasets.class_index.index import select_eval, select_train
from mmseg_sats.datasets.class_index.mask_scan import map_in_processes, read_labels
from mmseg_sats.protocol import Protocol, Stage

_COUNTS = Path(__file__).with_name('published_counts.csv')


class Pair(NamedTuple):
    """What one image and its mask hold."""

    counts: np.ndarray  # (256,) int64, pixels per number in the mask
    fault: str | None


@dataclass
class Examination:
    """What was found in one list of images.

    Attributes:
        images: (N,) paths of the images whose masks can be used.
        counts: (N, 256) int64: pixels per class id.
        faults: What is wrong, a line each, naming the file.
    """

    images: list[str]
    counts: np.ndarray
    faults: list[str]
    _dealt: np.ndarray | None = field(default=None, init=False, repr=False)

    def rows(self, stage: Stage, mode: str, setting: str = 'overlapped') -> np.ndarray:
        """The rows of the images that a stage trains with or is evaluated on.

        Args:
            stage: the stage.
            mode: ``'train'``, or anything else for the images with a seen class.
            setting: as in ``IncrementalDataset``.
        """
        presence = self.counts > 0
        if mode != 'train':
            return select_eval(presence, stage)
        if setting == 'partitioned' and self._dealt is None:
            self._dealt = deal(presence, self.images, (*stage.seen, *stage.future))
        return select_train(presence, stage, setting, self._dealt)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """(256,) int64: pixels per class id over some rows."""
        return self.counts[rows].sum(axis=0)


def examine(
    infos: Sequence[Mapping[str, Any]],
    sizes: PairSizes,
    num_classes: int,
    label_ids: Mapping[int, int] | None = None,
    ignore_index: int = 255,
    progress: Callable[[Iterable], Iterable] = iter,
    workers: int | None = None,
) -> Examination:
    """Reads all images' headers and all masks, and collects faults instead of stopping at the first.

    Args:
        infos: entries of the data set's list, with ``img_path`` and ``seg_map_path``.
        sizes: tells how the files are loaded.
        num_classes: foreground classes.
        label_ids: number in the masks to class id; None: every number is its class.
        ignore_index: the ignored number.
        progress: wraps the iteration over the files, to show how far it is.
        workers: processes; the available cores by default.
    """
    ids = {number: number for number in range(num_classes + 1)} if label_ids is None else label_ids
    ids = {ignore_index: ignore_index, **ids}
    known = np.zeros(256, bool)
    known[list(ids)] = True
    images, faults = [], []
    # Made before: arrays that are made between decoded images would keep their memory from being used again.
    counts = np.zeros((len(infos), 256), np.int64)
    with map_in_processes(partial(examine_pair, sizes=sizes), infos, workers) as pairs:
        for info, (numbers, fault) in zip(infos, progress(pairs), strict=True):
            image, mask = info['img_path'], info['seg_map_path']
            unknown = np.flatnonzero((numbers > 0) & ~known).tolist()
            if fault is None and unknown:
                fault = f'mask {mask} holds the numbers {unknown}, which stand for no class'
            if fault is not None:
                faults.append(fault)
                continue
            for number, class_id in ids.items():
                counts[len(images), class_id] += numbers[number]
            images.append(image)
    return Examination(images, counts[: len(images)], faults)


def examine_pair(info: Mapping[str, Any], sizes: PairSizes) -> Pair:
    """Reads one mask, and decodes its image."""
    nothing = np.zeros(256, np.int64)
    try:
        check_decodes(info['img_path'])
        sizes.images.of(info)  # before the mask, of which there may be none
        labels = read_labels(info['seg_map_path'], sizes.mask_backend)
        sizes.check(info)
    except (FileNotFoundError, ValueError) as error:
        return Pair(nothing, str(error))
    return Pair(np.bincount(labels.ravel(), minlength=256), None)


def published_counts(
    dataset: str, protocol: Protocol, split: str, setting: str = ''
) -> tuple[list[int], str] | None:
    """The published number of images of each stage and its source; None where it is not published.

    Args:
        dataset: the config's key ``dataset``, ``'voc'`` or ``'ade20k'``.
        protocol: with the default class order; others have other counts.
        split: ``'train'``, or ``'val'`` for the images with a seen class.
        setting: of the training images.
    """
    if protocol.class_order != tuple(range(1, protocol.num_classes + 1)):
        return None
    key = (dataset, protocol.name, setting if split == 'train' else '', split)
    with _COUNTS.open(encoding='utf-8', newline='') as file:
        for row in csv.DictReader(file):
            if key == tuple(row[name] for name in ('dataset', 'protocol', 'setting', 'split')):
                return [int(word) for word in row['images per stage'].split()], row['source']
    return None
