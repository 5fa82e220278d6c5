# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks before the first iteration: options, numbers, device, data, and the checkpoint for stage 0."""

import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmseg.registry import DATASETS

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.datasets.checks.label_lines import label_lines, note_on_repeated, notes_on_classes
from mmseg_sats.datasets.incremental_dataset import NoImagesError
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.datasets.memory.replay_sampler import batch_split
from mmseg_sats.engine.checks.trial_build import build_model, trains_on_one_image
from mmseg_sats.engine.config.variables import variables_in
from mmseg_sats.engine.evaluation import evaluation_set
from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.utils.config_keys import KEYS, STAGE_PARTS, names
from mmseg_sats.utils.spelling import check_choice, near_match, one_slip

DEVICES = (None, 'cuda', 'cpu')
_TABLE = {key.name for key in KEYS}
# Keys that are read by their name. The table's other keys have an effect only if a config uses them as $name.
_READ = _TABLE - set(names(read_by='config'))
# Keys that cannot have another value in some stages.
_RUN_WIDE = _TABLE - set(names(scope='stage'))


def known_keys(cfg: Config) -> set[str]:
    """The top-level keys that ``--cfg-options`` may set: those of the config, and those that a run reads."""
    return {*cfg.keys(), *_READ}


def check_cfg_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Checks that every option of ``--cfg-options`` sets a key that the config has or that a run reads.

    Args:
        cfg: the config before the options are merged in.
        options: dotted key to value.

    Raises:
        KeyError: there is no such key; the message suggests a near match.
        ValueError: an option has no value.
    """
    known = known_keys(cfg)
    for option in options:
        key = option.split('.')[0]
        if key not in known:
            raise KeyError(
                f'option {option}: the config has no {key!r}{near_match(key, known)}'
            )
        if options[option] == '':
            raise ValueError(
                f"option {option}= has no value. Where it was a $name, the shell took it for its "
                f"own: expected quotes around it, '{option}=$name'"
            )


def check_config(cfg: Config) -> None:
    """Checks the top-level keys of a run's config and the values that it sets for some stages only.

    Raises:
        KeyError: a key is not read, and is probably a misspelling of one that is.
        ValueError: a number or the device is impossible.
        TypeError: a value of the config has the wrong type.
    """
    content = cfg._cfg_dict.to_dict()
    _check_keys(content)
    resume = content.get('resume')
    if not isinstance(resume, bool | None):
        raise TypeError(f'resume={resume!r}: expected True or False')
    for part in STAGE_PARTS:
        inner = content.get(part) or {}
        if not isinstance(inner, dict):
            raise TypeError(f'{part} must be a dict of config values, got {inner!r}')
        _check_part(part, inner, content)
        _check_numbers(inner, f'{part}.')
    _check_numbers(content, '')
    _check_device(cfg.get('device'))
    wrapper = (content.get('optim_wrapper') or {}).get('type')
    if wrapper == 'AmpOptimWrapper' and not torch.cuda.is_available():
        raise ValueError(
            'mixed precision (--amp, AmpOptimWrapper) needs a GPU, which torch does not find: leave '
            'it out, or expected a CUDA build of torch and a driver'
        )


def _check_keys(content: Mapping[str, Any]) -> None:
    known = {*_TABLE, *variables_in(content)}
    for key in content:
        # Other keys that are not read may be helper values of the config file, so they are allowed.
        if key not in known and _close(key, _TABLE):
            raise KeyError(
                f'config key {key!r} is read by nothing{near_match(key, known)}: correct it or take it out'
            )


def _check_part(part: str, inner: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Checks the values that only some stages have: no key is misspelt or must be the same for the whole run."""
    read = {*_READ, *content, *variables_in(content)}
    for option in inner:
        key = option.split('.')[0]
        if key in _RUN_WIDE:
            raise ValueError(
                f'{part}.{key}: all stages of a run have the same {key}, expected it at the top level'
            )
        # As at the top level, other keys are allowed: a user's hook may read them.
        if key not in read and _close(key, read):
            raise KeyError(f'{part}.{key} is read by nothing{near_match(key, read)}: correct it or take it out')


def _close(key: str, read: Collection[str]) -> bool:
    """Whether ``key`` is one typing error away from a key that is read; ``crop2`` and ``order_b`` are no errors."""
    return re.sub(r'_[a-z]$|[0-9_]+$', '', key) not in read and any(one_slip(key, other) for other in read)


def _check_numbers(content: Mapping[str, Any], path: str) -> None:
    for key in KEYS:
        value = content.get(key.name, key.least)
        if key.least is None or (value is None and key.or_none) or _is_variable(value):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < key.least:
            raise ValueError(f'{path}{key.name}={value!r}: expected a whole number from {key.least}')
    rate = content.get('lr')
    if not (rate is None or _is_variable(rate)) and not _positive(rate):
        raise ValueError(f'{path}lr={rate!r}: expected a number above 0')
    factor = content.get('head_lr_mult', 1)
    if not _is_variable(factor) and not _positive(factor) and factor != 0:
        raise ValueError(f'{path}head_lr_mult={factor!r}: expected a number from 0')
    size = content.get('crop_size', 1)
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
    if not _is_variable(size) and not all(_positive(side) and isinstance(side, int) for side in sides):
        raise ValueError(
            f'{path}crop_size={size!r}: expected a number of pixels from 1, or two, (h, w)'
        )


def _is_variable(value: Any) -> bool:
    return isinstance(value, str) and value.startswith('$')


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check_device(device: Any) -> None:
    check_choice('device', device, DEVICES)
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch finds no GPU (torch.cuda.is_available() is False): expected a "
            'CUDA build of torch and a driver, or device=None, which takes what there is'
        )
    if device == 'cpu' and torch.cuda.is_available():
        raise ValueError(
            "device='cpu', but there is a GPU, which mmengine would take: hide it by setting "
            'CUDA_VISIBLE_DEVICES to nothing before the command'
        )


def check_data(stages: Sequence[Config], first: int = 0) -> None:
    """Reads the lists and masks of a run, and checks that every stage of its protocol has images.

    Args:
        stages: the stages' configs.
        first: the first stage that needs images.

    Raises:
        FileNotFoundError: a list, image or mask does not exist.
        ValueError: a mask has impossible labels, an image and its mask differ in size, a path leaves
            the data root, a file is not an image, a stage has no images, no held-out image shows some
            class, the last batch has one image and the model cannot be trained with it, or the
            loaders or stages have different classes.
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
        if cfg is cfgs[0] and part == 'train_dataloader' and isinstance(dataset, IncrementalDataset):
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
        *note_on_repeated('evaluation', evaluation.repeated_images),
    ]
    for note in notes:
        print_log(note, logger='current', level=logging.WARNING)


def lines_on_labels(train: IncrementalDataset, evaluation: IncrementalDataset) -> Iterator[str]:
    """How the labels of a run are read, see :func:`label_lines`; together where both data sets have the same."""
    both = {'train': train, 'evaluation': evaluation}
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


def check_base(cfg: Config, base: Path) -> None:
    """Checks that stage 0 can be taken from a checkpoint.

    Args:
        cfg: the config of stage 0.
        base: the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it cannot be read safely, or has other classes or another model.
    """
    if not base.is_file():
        raise FileNotFoundError(f'base {base}: no such checkpoint')
    classes = evaluation_set(cfg).metainfo['classes']
    adopt_base(build_model(cfg), base, classes)
