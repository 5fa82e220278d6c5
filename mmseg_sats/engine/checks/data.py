# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks a run's data before the first iteration, and tells how their labels are read."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmseg.registry import DATASETS

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.datasets.checks.label_lines import label_lines, note_on_repeated, notes_on_classes
from mmseg_sats.datasets.checks.whole_labels import check_whole_labels
from mmseg_sats.datasets.incremental_dataset import NoImagesError
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.datasets.memory.replay_sampler import batch_split
from mmseg_sats.engine.checks.trial_build import trains_on_one_image


def check_data(stages: Sequence[Config], first: int = 0) -> None:
    """Reads the lists and masks of a run, and checks that every stage of its protocol has images.

    Args:
        stages: the stages' configs.
        first: the first stage that needs images.

    Raises:
        FileNotFoundError: a list, image or mask does not exist.
        ValueError: a mask has impossible labels, an image and its mask differ in size, a path leaves
            the data root, a file is not an image, a stage has no images, no held-out image shows some
            class, the last batch has one image and the model cannot be trained with it, a transform mixes
            labels, or the loaders or stages have different classes.
    """
    # The last stage is checked too, since its transforms may differ. Lists and masks are read only once.
    cfgs = [stages[first], *stages[first + 1 :][-1:]]
    parts = ('train_dataloader', 'test_dataloader', 'val_dataloader')
    known: IncrementalDataset | None = None
    found: dict[str, IncrementalDataset] = {}
    for cfg, part in [(cfg, part) for cfg in cfgs for part in parts if cfg.get(part)]:
        try:
            dataset = DATASETS.build(stage_dataset_cfg(cfg[part].dataset))
            if hasattr(dataset, 'check_stages'):
                dataset.check_stages(first)
        except NoImagesError as error:
            if first or not cfg.get('model_config'):
                raise
            raise NoImagesError(
                f'{error}. model_config names a trained model: expected its checkpoint as base (--base)'
            ) from error
        if isinstance(dataset, IncrementalDataset):
            known = known or dataset
            _check_classes(part, dataset, known)
            found.setdefault(part, dataset)
        if part == 'train_dataloader' and isinstance(dataset, IncrementalDataset):
            check_whole_labels(dataset.pipeline.transforms, 'the training pipeline')
            if cfg is cfgs[0]:
                _check_last_batches(stages[first:], dataset)
        if part == 'val_dataloader' and cfg.get('held_out'):
            _check_held_out(dataset)
    if 'train_dataloader' in found and 'test_dataloader' in found:
        _tell_labels(found['train_dataloader'], found['test_dataloader'], first)


def _tell_labels(train: IncrementalDataset, evaluation: IncrementalDataset, first: int) -> None:
    """Logs how labels are read, how often each class occurs, and what no image shows."""
    for line in lines_on_labels(train, evaluation):
        print_log(line, logger='current')
    notes = [
        *notes_on_classes(train.labels, train.protocol, train.shown(), evaluation.shown(), first),
        *note_on_repeated('train', train.repeated_images),
        *note_on_repeated('val', evaluation.repeated_images),
    ]
    for note in notes:
        print_log(note, logger='current', level=logging.WARNING)


def lines_on_labels(train: IncrementalDataset, evaluation: IncrementalDataset) -> Iterator[str]:
    """How the labels of a run are read, see :func:`label_lines`; together where both data sets have the same."""
    both = {'train': train, 'val': evaluation}
    groups = [both] if train.labels == evaluation.labels else [{name: one} for name, one in both.items()]
    for group in groups:
        one = next(iter(group.values()))
        shown = {name: dataset.shown() for name, dataset in group.items()}
        yield from label_lines(one.labels, one.protocol, shown, one.ignore_index)


def _check_classes(part: str, dataset: IncrementalDataset, known: IncrementalDataset) -> None:
    """Checks that all data name the classes in the same order; otherwise IoUs would be given to wrong classes."""
    for what, found, expected in (
        ('classes', dataset.class_names, known.class_names),
        ('stages', *([list(stage.new) for stage in one.protocol.stages] for one in (dataset, known))),
    ):
        if found != expected:
            raise ValueError(
                f"{part} of stage {dataset.stage.index} has the {what} {found}: expected those of the "
                f"run's other data, {expected}"
            )


def _check_last_batches(stages: Sequence[Config], dataset: IncrementalDataset) -> None:
    """Checks that no last batch has one image if the model has a norm after pooling to 1 x 1, which then fails."""
    for cfg, stage in zip(stages, dataset.protocol.stages[-len(stages) :], strict=True):
        loader, images = cfg.train_dataloader, len(dataset.rows_of(stage))
        size, limit = loader.get('batch_size'), loader.get('num_batch_per_epoch')
        _check_whole_batch(loader, images, stage.index)
        replayed = stage_dataset_cfg(loader.dataset) is not loader.dataset
        batches = loader.get('batch_sampler') or {}
        sampled = (loader.get('sampler') or {}).get('type') == 'DefaultSampler' and (
            not batches or batches.get('endless')
        )
        if replayed or not sampled or not size:
            continue  # the sizes of these batches are not known here
        # Processes share the batches of one: of the last, some get one image if there are fewer than two for each.
        processes = get_world_size()
        whole = size * processes
        smaller = not (loader.get('drop_last') or batches.get('endless') or (limit and images >= limit * whole))
        reached = size == 1 or (smaller and images <= cfg.train_cfg.get('max_iters', math.inf) * whole)
        alone = size == 1 or 0 < images % whole < 2 * processes
        if reached and alone and not trains_on_one_image(cfg, processes):
            shared = '' if processes == 1 else f' on each of {processes} processes'
            raise ValueError(
                f'stage {stage.index}: {images} images in batches of {size}{shared} leave one image for '
                f'{"the last" if processes == 1 else "a process in the last"}, with which this model cannot be '
                'trained (a norm in it would see one value a channel): expected another batch_size'
                + ('' if size == 1 else ', or train_dataloader.drop_last=True')
                + ('' if processes == 1 else ", or sync_bn='torch'")
            )


def _check_whole_batch(loader: Mapping[str, Any], images: int, stage: int) -> None:
    """Checks that a stage trains at all where the last batch is dropped if it is not full."""
    sampler = loader.get('batch_sampler') or {}
    by_epoch = (loader.get('sampler') or {}).get('type') == 'DefaultSampler'
    size = (loader.get('batch_size') or 1) * get_world_size()
    if not (by_epoch and (sampler.get('drop_last') or loader.get('drop_last'))):
        return
    share, replayed = sampler.get('share'), ''
    if sampler.get('type') == 'ReplayBatchSampler':
        sources = [name for name in ('exemplars', 'outside') if loader.dataset.get(name)]
        if share is None:
            return  # how many images there are with the replayed ones is not known here
        size = batch_split(size, share, len(sources))[0]
        replayed = f' with {size} places for them beside those of replay'
    if images < size:
        raise ValueError(
            f'stage {stage}: {images} images do not fill one batch{replayed or f" of {size}"}, and drop_last=True '
            'leaves out the last one, so nothing would be trained: expected a smaller batch_size, or drop_last=False'
        )


def _check_held_out(dataset: IncrementalDataset) -> None:
    """Checks that the held-out images show every class; the best epoch could otherwise be one that forgot a class."""
    stages = dataset.protocol.stages
    shown = dataset.class_index.presence[dataset.rows_of(stages[-1])].any(axis=0)
    absent = [dataset.class_names[c] for c in stages[-1].seen if not shown[c]]
    if absent:
        raise ValueError(
            f'held_out={dataset.held_out}: no held-out image shows {", ".join(absent)}: expected every '
            'class, old ones too, in the masks of the training images, and a share that is large enough'
        )
