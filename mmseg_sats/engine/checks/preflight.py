# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks before the first iteration: options, numbers, device, and the checkpoint for stage 0."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmseg_sats.engine.checks.trial_build import build_model
from mmseg_sats.engine.checks.values import check_device, check_numbers
from mmseg_sats.engine.config.variables import variables_in
from mmseg_sats.engine.evaluation import evaluation_set
from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.utils.config_keys import KEYS, STAGE_PARTS, names
from mmseg_sats.utils.spelling import near_match, one_slip

_TABLE = {key.name for key in KEYS}
# Keys that are read by their name. The table's other keys have an effect only if a config uses them as $name.
_READ = _TABLE - set(names(read_by='config'))
# Keys that cannot have another value in some stages.
_RUN_WIDE = _TABLE - set(names(scope='stage'))

_READ_AS_THEY_ARE = ('train_dataloader', 'test_dataloader')
_LOADERS = (*_READ_AS_THEY_ARE, 'val_dataloader')
# Of mmseg 0.x, and what stands for them now.
_OLD_KEYS = dict(
    lr_config='param_scheduler', optimizer_config='optim_wrapper', checkpoint_config='default_hooks.checkpoint',
    log_config='default_hooks.logger', evaluation='test_evaluator', runner='epochs or iters', total_epochs='epochs',
    resume_from='resume (--resume)',
)  # fmt: skip
# Where the name of a key is never meant as a text.
_NO_TEXTS = {'dataset', 'pipeline', 'type', 'sampler', 'metainfo', 'optimizer', 'norm_cfg', 'data_root', *_LOADERS}


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
        KeyError: a key is not read, and is probably a misspelling of one that is, or one of mmseg 0.x.
        ValueError: a number or the device is impossible, or the name of a key stands where its value is meant.
        TypeError: a value of the config has the wrong type.
    """
    content = cfg._cfg_dict.to_dict()
    _check_keys(content)
    _check_old_keys(content)
    _check_names_of_keys(content, content)
    for key in ('model', *_LOADERS):
        value = content.get(key)
        if isinstance(value, str) and (key in _READ_AS_THEY_ARE or not value.startswith('$')):
            raise TypeError(f'{key}={value!r}: expected a dict')
    resume = content.get('resume')
    if not isinstance(resume, bool | None):
        raise TypeError(f'resume={resume!r}: expected True or False')
    for part in STAGE_PARTS:
        inner = content.get(part) or {}
        if not isinstance(inner, dict):
            raise TypeError(f'{part} must be a dict of config values, got {inner!r}')
        _check_part(part, inner, content)
        check_numbers(inner, f'{part}.')
    check_numbers(content, '')
    check_device(cfg.get('device'))
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


def _check_old_keys(content: Mapping[str, Any]) -> None:
    """Refuses the keys of mmseg 0.x, which mmengine does not read and so would leave without effect."""
    used = variables_in(content)
    for key, now in _OLD_KEYS.items():
        if content.get(key) and key not in used:
            raise KeyError(f'config key {key!r} is of mmseg 0.x and has no effect: expected {now}')
    data = content.get('data')
    if isinstance(data, Mapping) and 'samples_per_gpu' in data and 'data' not in used:
        raise KeyError(
            "config key 'data' is of mmseg 0.x and has no effect: expected batch_size, num_workers, train_dataset and "
            'eval_dataset'
        )


def _check_names_of_keys(content: Mapping[str, Any], value: Any, path: str = '') -> None:
    """Refuses the bare name of a key where the key's value is meant, as in ``pipeline='train_pipeline'``."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        where = f'{path}[{key}]' if isinstance(key, int) else f'{path}.{key}'.lstrip('.')
        if not isinstance(item, str):
            _check_names_of_keys(content, item, where)
        elif item in content and item != key and key in _NO_TEXTS:
            raise ValueError(f'{where}={item!r} is the name of a key: expected its value, \'${item}\'')


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
