# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Counts images and pixels per class and stage, and lists every fault of a config's data."""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from mmengine.config import Config
from mmseg.registry import DATASETS
from prettytable import PrettyTable
from rich.console import Console
from rich.progress import track

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.datasets.checks.image_sizes import PairSizes
from mmseg_sats.datasets.checks.label_lines import (
    Shown,
    label_lines,
    note_on_repeated,
    notes_on_classes,
)
from mmseg_sats.datasets.checks.whole_dataset import Examination, examine, published_counts
from mmseg_sats.datasets.class_index.label_numbers import check_background, hint_on_binary_masks
from mmseg_sats.datasets.wrapped_dataset import check_list, check_places, first_of_each
from mmseg_sats.engine.config.variables import config_variables, resolve_variables

MODES = {'train': 'train_dataloader', 'val': 'test_dataloader'}


def build_dataset(cfg: Config, loader: str) -> IncrementalDataset:
    """Stage 0 of the config's data, without reading any list or mask."""
    dataset = cfg[loader].dataset.to_dict()
    words = config_variables(cfg) | dict(stage=0)
    return DATASETS.build(dict(resolve_variables(dataset, words, f'{loader}.dataset'), lazy_init=True))


def examine_dataset(dataset: IncrementalDataset, mode: str) -> tuple[Examination, list[str]]:
    """Reads every image and mask of the wrapped dataset; returns what is in them, and notes."""
    faults: list[str] = []
    infos: list[dict] = []
    try:
        for part in getattr(dataset.dataset, 'parts', [dataset.dataset]):
            check_list(part)
            own = part.load_data_list()
            infos += own
            try:
                check_places(part, own, dataset.mask_root)
            except ValueError as error:
                faults.append(f'{mode}: {error}')
    except (AssertionError, OSError, ValueError) as error:
        return Examination([], np.zeros((0, 256), np.int64), [f'{mode}: {error}']), []
    infos = [info | dict(seg_map_path=info.get('seg_map_path') or 'without a path') for info in infos]
    first = first_of_each([info['img_path'] for info in infos])
    notes = note_on_repeated(mode, [info['img_path'] for info, new in zip(infos, first, strict=True) if not new])
    infos = [info for info, new in zip(infos, first, strict=True) if new]
    found = examine(
        infos,
        PairSizes(dataset.pipeline.transforms, dataset.mask_backend),
        dataset.protocol.num_classes,
        dataset.labels.numbers,
        dataset.ignore_index,
        partial(_show, mode=mode, total=len(infos)),
    )
    found.faults[:0] = faults
    if not infos:
        found.faults.append(f'{mode}: no images in {dict(dataset.dataset.data_prefix)}')
    try:
        check_background(dataset.labels, (found.counts > 0).any(axis=0), type(dataset.dataset).__name__)
    except ValueError as error:
        found.faults.append(f'{mode}: {error}')
    return found, list(notes)


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
        train = datasets['train']
        self.datasets, self.protocol, self.names, self.setting = (
            datasets, train.protocol, train.class_names, train.setting
        )
        examined = {mode: examine_dataset(datasets[mode], mode) for mode in MODES}
        self.found = {mode: found for mode, (found, _) in examined.items()}
        self.faults = [fault for found in self.found.values() for fault in found.faults]
        self.notes = [note for _, notes in examined.values() for note in notes]

    def label_lines(self) -> Iterator[str]:
        """How labels are read, as at the start of a run."""
        groups = [list(MODES)] if self.datasets['train'].labels == self.datasets['val'].labels else [[m] for m in MODES]
        for group in groups:
            one = self.datasets[group[0]]
            shown = {mode: self.shown(mode) for mode in group}
            yield from label_lines(one.labels, self.protocol, shown, one.ignore_index)

    def shown(self, mode: str) -> Shown:
        """What the images of a list show."""
        found = self.found[mode]
        return Shown(found.counts > 0, [found.rows(stage, mode, self.setting) for stage in self.protocol.stages])

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
        last = self.protocol.stages[-1]
        everything = {'train': slice(None), 'val': self.found['val'].rows(last, 'val')}
        for class_id, name in ((0, self.names[0]), (self.datasets['train'].ignore_index, '(ignored)')):
            cells = []
            for mode, found in self.found.items():
                pixels = found.counts[everything[mode], class_id]
                cells += [int((pixels > 0).sum()), f'{pixels.sum():,}']
            table.add_row([name, '-', *cells])
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
        if mode == 'train' and stage > 0:
            binary = hint_on_binary_masks((self.found['train'].counts > 0).any(axis=0), self.names)
            self.faults.append(f'train: no image of stage {stage} shows {name}{binary}')
        elif mode == 'train':
            self.notes.append(f'train: no image shows {name}: stage 0 must come from --base')

    def note_shared_images(self) -> None:
        """Images that are trained on and evaluated on."""
        both = set(self.found['train'].images) & set(self.found['val'].images)
        if both:
            self.faults.append(f'{len(both)} images are in train and in val, such as {min(both)}')


def print_tables(check: Check) -> None:
    """Images and pixels by stage and class, and the notes; what is wrong with them joins the faults."""
    for line in check.label_lines():
        print(line)
    print(f'{check.protocol}, {check.setting}: images per stage')
    print(check.images_table())
    print("images and pixels per class (train: in the class's own stage)")
    print(check.classes_table())
    check.note_shared_images()
    check.notes += notes_on_classes(check.datasets['val'].labels, check.protocol, None, check.shown('val'))
    for note in check.notes:
        print(f'note: {note}')
