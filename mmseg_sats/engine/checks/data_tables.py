# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Counts images and pixels per class and stage, and lists every fault of a config's data."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from mmengine.config import Config
from mmseg.registry import DATASETS
from prettytable import PrettyTable
from rich.console import Console
from rich.progress import track

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.datasets.checks.whole_dataset import Examination, examine, published_counts
from mmseg_sats.engine.config.variables import config_variables, resolve_variables

MODES = {'train': 'train_dataloader', 'val': 'test_dataloader'}


def build_dataset(cfg: Config, loader: str) -> IncrementalDataset:
    """Stage 0 of the config's data, without reading any list or mask."""
    dataset = cfg[loader].dataset.to_dict()
    words = config_variables(cfg) | dict(stage=0)
    return DATASETS.build(dict(resolve_variables(dataset, words, f'{loader}.dataset'), lazy_init=True))


def examine_dataset(dataset: IncrementalDataset, mode: str) -> Examination:
    """Reads every image and mask of the wrapped dataset."""
    try:
        infos = dataset.dataset.load_data_list()
    except (AssertionError, OSError, ValueError) as error:
        return Examination([], np.zeros((0, 256), np.int64), [f'{mode}: {error}'])
    pairs = [(info['img_path'], info.get('seg_map_path') or 'without a path') for info in infos]
    found = examine(
        pairs,
        dataset.protocol.num_classes,
        getattr(dataset.dataset, 'label_ids', None),
        dataset.ignore_index,
        partial(_show, mode=mode, total=len(pairs)),
    )
    if not pairs:
        found.faults.append(f'{mode}: no images in {dict(dataset.dataset.data_prefix)}')
    return found


def _show(items: Iterable, mode: str, total: int) -> Iterable:
    console = Console(stderr=True)
    return track(items, description=f'reading {mode}', total=total, console=console)


class Check:
    """The data of one config: its tables, its faults and what is worth knowing.

    Args:
        cfg: a run's config.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        datasets = {mode: build_dataset(cfg, loader) for mode, loader in MODES.items()}
        self.protocol, self.names = datasets['train'].protocol, datasets['train'].class_names
        self.setting = datasets['train'].setting
        self.found = {mode: examine_dataset(datasets[mode], mode) for mode in MODES}
        self.faults = [fault for found in self.found.values() for fault in found.faults]
        self.notes: list[str] = []

    def images_table(self) -> PrettyTable:
        """Training and evaluation images of each stage beside those that it must have."""
        table = PrettyTable(['stage', 'classes', 'train', 'expected', 'val', 'val expected'])
        expected = {mode: self._expected(mode) for mode in MODES}
        for stage in self.protocol.stages:
            cells = []
            for mode, found in self.found.items():
                images = len(found.rows(stage, mode, self.setting))
                wanted = expected[mode][stage.index] if expected[mode] else None
                cells += [images, '-' if wanted is None else wanted]
                if wanted is not None and wanted != images:
                    self.faults.append(
                        f'{mode}: stage {stage.index} has {images} images, expected {wanted}'
                    )
            names = ', '.join(self.names[c] for c in stage.new)
            short = names if len(names) <= 28 else f'{len(stage.new)} classes'
            table.add_row([stage.index, short, *cells])
        return table

    def _expected(self, mode: str) -> list[int] | None:
        published = published_counts(self.cfg.get('dataset'), self.protocol, mode, self.setting)
        if published is None:
            return None
        self.notes.append(f'{mode} expected: {published[1]}')
        return published[0]

    def classes_table(self) -> PrettyTable:
        """Images and pixels of each class: in its own stage's training set, and in evaluation."""
        table = PrettyTable(['class', 'stage', 'train', 'train pixels', 'val', 'val pixels'])
        for stage in self.protocol.stages:
            rows = {mode: f.rows(stage, mode, self.setting) for mode, f in self.found.items()}
            pixels = {mode: found.pixels(rows[mode]) for mode, found in self.found.items()}
            for class_id in stage.new:
                cells = []
                for mode, found in self.found.items():
                    images = int((found.counts[rows[mode], class_id] > 0).sum())
                    cells += [images, f'{pixels[mode][class_id]:,}']
                    if images == 0:
                        self._note_absent(mode, stage.index, self.names[class_id])
                table.add_row([self.names[class_id], stage.index, *cells])
        return table

    def _note_absent(self, mode: str, stage: int, name: str) -> None:
        if mode == 'val':
            self.notes.append(f'val: no image shows {name}, its IoU will say nothing')
        elif stage == 0:
            self.notes.append(f'train: no image shows {name}: stage 0 must come from --base')
        else:
            self.faults.append(f'train: no image of stage {stage} shows {name}')

    def note_shared_images(self) -> None:
        """Images that are trained on and evaluated on."""
        both = set(self.found['train'].images) & set(self.found['val'].images)
        if both:
            self.faults.append(f'{len(both)} images are in train and in val, such as {min(both)}')


def print_tables(check: Check) -> None:
    """Images and pixels by stage and class, and the notes; what is wrong with them joins the faults."""
    print(f'{check.protocol}, {check.setting}: images per stage')
    print(check.images_table())
    print("images and pixels per class (train: in the class's own stage)")
    print(check.classes_table())
    check.note_shared_images()
    for note in check.notes:
        print(f'note: {note}')
