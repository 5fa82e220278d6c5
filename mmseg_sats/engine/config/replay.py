# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Replay of exemplars and outside images: checks before a run, changes to a stage's config, the choice of exemplars."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmseg.registry import DATASETS, TASK_UTILS

from mmseg_sats.datasets.joined_dataset import pipeline_of
from mmseg_sats.datasets.memory.exemplars import (
    Exemplar,
    Exemplars,
    read_exemplars,
    write_exemplars,
)
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.datasets.memory.replay_sampler import batch_split
from mmseg_sats.datasets.memory.selection import NONE, Candidates, ExemplarMemory, Picks
from mmseg_sats.datasets.wrapped_dataset import first_of_each
from mmseg_sats.protocol import Protocol, Stage
from mmseg_sats.utils.spelling import near_match

FILE_NAME = 'exemplars.json'
SELECTION = dict(type='ClassBalancedMemory')
SHARE = 0.5


def check_replay(cfg: Config, protocol: Protocol) -> None:
    """Checks before training that the run's options for replay are possible.

    Args:
        cfg: the run's config: ``memory``, ``memory_selection``, ``replay_share``,
            ``outside_dataset`` and ``outside_labeler``.
        protocol: its protocol.

    Raises:
        TypeError: ``memory`` is not a whole number.
        ValueError: ``memory`` is negative, smaller than the number of classes seen before the last
            stage, or set for a protocol with a single stage; or only one of ``outside_dataset`` and
            ``outside_labeler`` is set.
        KeyError: ``memory_selection`` is unknown.
    """
    memory, last = cfg.memory, protocol.stages[-1]
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f'memory={memory!r}: expected a whole number of images, 0 for none')
    if memory < 0:
        raise ValueError(f'memory={memory}: expected 0 (none) or a number of images')
    if memory and not last.old:
        raise ValueError(
            f'memory={memory}: protocol {protocol.name!r} has one stage, so nothing is replayed; '
            'expected 0'
        )
    if 0 < memory < len(last.old):
        raise ValueError(
            f'memory={memory} is too small: {len(last.old)} foreground classes are seen before the '
            f'last stage of {protocol.name!r}; expected 0 or at least {len(last.old)}'
        )
    build_memory(cfg)
    _check_outside(cfg)


def build_memory(cfg: Config) -> ExemplarMemory:
    """Builds the selection of exemplars from ``memory_selection``, ``memory`` and ``seed``.

    Raises:
        KeyError: the type is unknown; the message suggests a near match.
        ValueError: it has a size or seed of its own.
    """
    selection = dict(cfg.get('memory_selection') or SELECTION)
    if TASK_UTILS.get(selection['type']) is None:
        names = [name for name in TASK_UTILS.module_dict if name.endswith('Memory')]
        raise KeyError(
            f'memory_selection.type={selection["type"]!r} is unknown'
            f'{near_match(selection["type"], names)}; expected one of {sorted(names)} or a class '
            'registered in mmseg.registry.TASK_UTILS'
        )
    for key, instead in (('size', 'memory'), ('seed', 'seed')):
        if key in selection:
            raise ValueError(f'memory_selection.{key}={selection[key]!r} would not be used: expected {instead}')
    return TASK_UTILS.build(selection | dict(size=cfg.memory, seed=int(cfg.get('seed') or 0)))


def _check_outside(cfg: Config) -> None:
    outside, labeler = cfg.get('outside_dataset'), cfg.get('outside_labeler')
    if bool(outside) != bool(labeler):
        raise ValueError(
            'outside images need both outside_dataset (which they are) and outside_labeler (which '
            f'part labels them), got {outside!r} and {labeler!r}'
        )


def check_outside_folder(cfg: Config) -> None:
    """Checks before training that the outside images exist.

    Args:
        cfg: a stage's config, its variables resolved.

    Raises:
        ValueError: no folder of outside images is set, or it is empty.
        FileNotFoundError: the folder does not exist.
    """
    if cfg.get('outside_dataset'):
        DATASETS.build(dict(copy.deepcopy(cfg.outside_dataset), lazy_init=True))


def add_replay(cfg: Config, previous: str | Path) -> None:
    """Adds exemplars and outside images to the training data in a later stage's config, in place.

    Args:
        cfg: the stage's config, its variables resolved.
        previous: the folder of the previous stage.

    Raises:
        ValueError: the batch size is too small to hold images of every source.
    """
    outside, memory = cfg.get('outside_dataset'), cfg.get('memory')
    if not (outside or memory):
        return
    loader = cfg.train_dataloader
    parts: dict[str, Any] = {}
    if memory:
        parts.update(exemplars=str(Path(previous) / FILE_NAME), memory=memory)
    if outside:
        parts.update(outside=_outside_cfg(outside, loader.dataset))
        cfg.model.outside_labeler = cfg.outside_labeler
    share = cfg.get('replay_share', SHARE)
    if share is not None:
        batch_split(loader.batch_size, share, bool(memory) + bool(outside))
    loader.dataset = dict(
        type='ReplayDataset', stage_images=loader.dataset, seed=cfg.get('seed'), **parts
    )
    # Where the stage's own images come endlessly, the batches with replay do, too.
    endless = dict(endless=True) if (loader.get('batch_sampler') or {}).get('endless') else {}
    loader.batch_sampler = dict(
        type='ReplayBatchSampler', share=share, drop_last=loader.pop('drop_last', False), **endless
    )


def _outside_cfg(outside: Mapping[str, Any], stage_images: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the outside images, with the same transforms as the stage's own images."""
    pipeline = stage_images.get('pipeline') or pipeline_of(stage_images['dataset'])
    return dict(type='OutsideDataset', dataset=outside, pipeline=pipeline)


def keep_exemplars(cfg: Config, stage: Stage, folder: Path, previous: Path) -> None:
    """Chooses the exemplars and writes the stage's ``exemplars.json``; the list is empty if the run has no memory.

    Candidates are the stage's training images and the exemplars of the previous stage, each once. In a
    distributed run all ranks must call this.

    Args:
        cfg: the stage's config.
        stage: the stage that was just trained.
        folder: its folder.
        previous: the folder of the previous stage; not read at stage 0.

    Raises:
        ValueError: the exemplars of the previous stage are of another memory size or data set.
        FileNotFoundError: the previous stage has no ``exemplars.json``.
    """
    memory = build_memory(cfg)
    kept = _empty(memory, stage)
    if memory.size:
        old = _empty(memory, stage)
        if stage.index:
            old = read_exemplars(previous / FILE_NAME, memory.size)
        kept = _select(cfg, memory, stage, old, previous / FILE_NAME)
    if is_main_process():
        write_exemplars(folder / FILE_NAME, kept)


def _empty(memory: ExemplarMemory, stage: Stage) -> Exemplars:
    return Exemplars(stage.index, type(memory).__name__, memory.size, memory.seed, 0, ())


def _select(
    cfg: Config, memory: ExemplarMemory, stage: Stage, old: Exemplars, old_file: Path
) -> Exemplars:
    stage_images = stage_dataset_cfg(cfg.train_dataloader.dataset)
    dataset = DATASETS.build(stage_images)
    files, presence = dataset.image_files(), dataset.presence
    first = first_of_each(files)  # a RepeatDataset has each several times
    files, presence = [name for name, new in zip(files, first, strict=True) if new], presence[first]
    if old.exemplars:
        kept = DATASETS.build(dict(stage_images, mode='memory', exemplars=str(old_file)))
        known = {item.image for item in old.exemplars}
        new = [row for row, name in enumerate(files) if name not in known]
        presence = np.concatenate([kept.presence, presence[new]])
        files = [item.image for item in old.exemplars] + [files[row] for row in new]
    presence = presence[:, list(stage.seen)]
    names = [dataset.class_names[label] for label in stage.seen]
    unseen = {item.stands_for for item in old.exemplars} - {None, *names}
    if unseen:
        raise ValueError(
            f'{old_file} is of another run: its exemplars stand for {sorted(unseen)}, which stage '
            f'{stage.index} has not seen; expected {names}'
        )
    stands_for = [
        NONE if item.stands_for is None else names.index(item.stands_for) for item in old.exemplars
    ]
    candidates = Candidates(presence, np.array(stands_for, dtype=np.int64), old.offered)
    picks = memory.select(candidates, stage.index)
    offered = old.offered + len(files) - len(old.exemplars)
    items = tuple(_exemplars(picks, files, presence, names))
    return Exemplars(
        stage.index, type(memory).__name__, memory.size, memory.seed, offered, items
    )


def _exemplars(
    picks: Picks, files: list[str], presence: np.ndarray, names: list[str]
) -> list[Exemplar]:
    return [
        Exemplar(
            files[row],
            None if c == NONE else names[c],
            tuple(names[k] for k in np.flatnonzero(presence[row])),
        )
        for row, c in zip(*(array.tolist() for array in picks), strict=True)
    ]
