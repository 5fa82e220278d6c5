# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks of a config's values: numbers, device, lengths, weights of losses, seeds."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from mmseg_sats.utils.config_keys import KEYS
from mmseg_sats.utils.spelling import check_choice

DEVICES = (None, 'cuda', 'cpu')


def check_numbers(content: Mapping[str, Any], path: str) -> None:
    """Checks the numbers among a config's keys.

    Args:
        content: the config, or a part of it for some stages.
        path: what stands before a key in messages.

    Raises:
        ValueError: a number is impossible.
    """
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
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def check_device(device: Any) -> None:
    """Checks that the machine has the device that the config asks for.

    Raises:
        ValueError: it has not.
    """
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


def check_values(cfg: Config) -> None:
    """Checks values of a stage's config that training would accept, and that cannot be meant.

    Raises:
        ValueError: a loss has a negative or endless weight, a schedule needs a validation that there is not, or two
            values of the seed differ.
    """
    for path, weight in _loss_weights('model', cfg.model.to_dict()):
        if isinstance(weight, bool | str) or (isinstance(weight, int | float) and not 0 <= weight < math.inf):
            raise ValueError(f'{path}={weight!r}: expected a number from 0')
    schedules = cfg.get('param_scheduler') or []
    for schedule in schedules if isinstance(schedules, list | tuple) else [schedules]:
        kind = schedule.get('type') if isinstance(schedule, Mapping) else None
        kind = PARAM_SCHEDULERS.get(kind) if isinstance(kind, str) else kind
        if getattr(kind, 'need_val_args', False) and not cfg.get('val_dataloader'):
            raise ValueError(
                f'param_scheduler: {kind.__name__} follows a validation, and stages have none: expected a share of the '
                'training images as held_out (0.2, say), or another schedule'
            )
    seed = (cfg.get('randomness') or {}).get('seed', cfg.get('seed'))
    if seed != cfg.get('seed'):
        raise ValueError(f'randomness.seed={seed!r} beside seed={cfg.get("seed")!r}: expected seed alone')


def _loss_weights(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        value = {f'[{index}]': item for index, item in enumerate(value)}
    for key, item in value.items() if isinstance(value, dict) else ():
        where = f'{path}{key}' if key.startswith('[') else f'{path}.{key}'
        if key == 'loss_weight':
            yield where, item
        else:
            yield from _loss_weights(where, item)


def check_length(cfg: Config) -> None:
    """Checks that a stage has an epoch or iteration at least; the rehearsal has its own.

    Raises:
        ValueError: it has not.
    """
    for limit in ('max_epochs', 'max_iters'):
        value = (cfg.get('train_cfg') or {}).get(limit, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'train_cfg.{limit}={value!r}: expected a whole number from 1')
