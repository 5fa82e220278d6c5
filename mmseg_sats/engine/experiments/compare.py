# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Whether two configs make the same run, and whether two runs have the same stage 0.

Configs are compared as the stages see them: variables resolved, stage by stage, and without what changes no
weight and no figure (logs, checkpoints, workers, where data lies).
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, init_default_scope
from mmseg.registry import DATASETS, MODELS

from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.config.variables import config_variables, resolve_variables
from mmseg_sats.engine.experiments.cross_entropy_alike import as_plain
from mmseg_sats.models.parts import DistillationPart, flag, with_wrapped
from mmseg_sats.protocol import Protocol, Stage
from mmseg_sats.utils.config_keys import EXECUTION, IDENTITY, LOADING, STAGE_PARTS, names

Flat = dict[str, Any]

TRAINING = names(compared='training')
EVALUATION = names(compared='evaluation')
VALIDATION = names(compared='validation')
# What the segmentor does not use without an old model, except losses that need none.
LATER_PARTS = ('pseudo_labeler', 'pixel_weights', 'classifier_init', 'old_model')
# Arguments of an IncrementalDataset that the classes of the stage already determine.
STAGE_KEYS = ('protocol', 'stage', 'split', 'class_order')
# Workers, how a GPU is given its work, and the type of the loop, which max_epochs or max_iters already determines.
_HOW = re.compile(rf'(^|\.)({"|".join(LOADING + EXECUTION)}|train_cfg\.(type|by_epoch))$')
_ABSENT = object()
SHOWN = 4


@dataclass(frozen=True)
class Fingerprint:
    """Everything in a config that its results depend on.

    Attributes:
        run: everything that a figure depends on.
        start: what stage 0's weights depend on; runs with the same may share it.
        variables: the top-level values that these come from, for messages.
        num_classes: how many foreground classes the data set has.
        num_stages: how many stages there are.
    """

    run: Flat
    start: Flat
    variables: Flat
    num_classes: int
    num_stages: int


def fingerprint(
    cfg: Config, num_classes: int | None = None, seeded_start: bool = False
) -> Fingerprint:
    """The fingerprint of a run's config, ``work_dir`` or not.

    Args:
        cfg: the config.
        num_classes: how many foreground classes there are; by default the data set is asked, which must
            be where the config says.
        seeded_start: whether runs with different seeds each have their own stage 0. If there is only one
            stage, they always have, since nothing else could differ.

    Raises:
        KeyError: the config uses a variable that it does not define.
        ValueError: an impossible protocol, or a data set that is not there.
    """
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    cfg = copy.deepcopy(cfg)
    num_classes = num_classes or _count_classes(cfg)
    said = resolve_variables(
        {key: cfg.get(key) for key in ('protocol', 'class_order', 'split')}, config_variables(cfg)
    )
    protocol = Protocol(said['protocol'], num_classes, said['class_order'], said['split'])
    run = comparable_values({key: cfg.get(key) for key in IDENTITY})
    if cfg.get('memory'):
        run.update(comparable_values(cfg.get('memory_selection'), 'memory_selection'))
    variables = comparable_values({key: cfg.get(key) for key in _used_variables(cfg) + STAGE_PARTS if cfg.get(key)})
    seed = cfg.get('seed')
    cfg.merge_from_dict(dict(seed=0))  # compared above already, so not again in every part that uses it
    for stage in {0: protocol.stages[0], -1: protocol.stages[-1]}.values():
        part = build_stage_config(cfg, protocol, stage, '')
        name = f'stage_{stage.index}'
        run.update(comparable_values({key: part.get(key) for key in TRAINING + EVALUATION}, name))
    # The memory is empty in stage 0, however large it may become.
    cfg.merge_from_dict(dict(memory=0))
    start = _start(build_stage_config(cfg, protocol, protocol.stages[0], ''), protocol.stages[0])
    if seeded_start or len(protocol.stages) == 1:
        start['seed'] = seed
    return Fingerprint(run, start, variables, num_classes, len(protocol.stages))


def _used_variables(cfg: Config) -> tuple[str, ...]:
    """The top-level values that the stages' training and evaluation are made of."""
    raw = cfg._cfg_dict.to_dict()
    used: dict[str, None] = {}
    unread = [raw.get(key) for key in TRAINING + EVALUATION]
    while unread:
        for value in comparable_values(unread.pop()).values():
            name = value[1:] if isinstance(value, str) and value.startswith('$') else None
            if name in raw and name not in used:
                used[name] = None
                unread.append(raw[name])
    return tuple(used)


def _count_classes(cfg: Config) -> int:
    """The number of foreground classes, which only the data set knows."""
    dataset = resolve_variables(
        cfg.train_dataloader.dataset.to_dict(), config_variables(cfg) | dict(stage=0)
    )
    return DATASETS.build(dict(dataset, lazy_init=True)).protocol.num_classes


def _start(cfg: Config, stage: Stage) -> Flat:
    """What the weights of stage 0 depend on, except for the seed."""
    parts = {key: copy.deepcopy(cfg.get(key)) for key in TRAINING}
    for key in LATER_PARTS:
        parts['model'].pop(key, None)
    losses = parts['model'].get('distillation') or {}
    parts['model'].distillation = {
        name: loss for name, loss in losses.items() if loss and not _needs_teacher(loss)
    }
    for head in _heads(parts['model']):
        losses = head.loss_decode
        losses = losses if isinstance(losses, list | tuple) else [losses]
        head.loss_decode = [as_plain(loss, stage.num_channels) for loss in losses]
    if cfg.get('val_dataloader'):  # the images held out decide which epoch is kept
        parts.update({key: copy.deepcopy(cfg.get(key)) for key in VALIDATION})
    for name in parts.keys() & {'train_dataloader', 'val_dataloader'}:
        for key in STAGE_KEYS:
            parts[name].dataset.pop(key, None)
    return comparable_values(parts) | dict(new=list(stage.new), future=sorted(stage.future))


def _heads(model: ConfigDict) -> list[ConfigDict]:
    heads = model.get('auxiliary_head') or []
    heads = [model.decode_head, *(heads if isinstance(heads, list) else [heads])]
    return [head for head in heads if head.get('loss_decode')]


def _needs_teacher(loss: Mapping[str, Any]) -> bool:
    *_, own = with_wrapped(loss)
    return flag(MODELS.get(own['type']), 'needs_teacher', DistillationPart)


def comparable_values(value: Any, path: str = '') -> Flat:
    """Path to plain value for every leaf of a config; of a file only its name is kept, not its folder."""
    if path.endswith('custom_hooks'):
        value = {hook['type']: dict(hook, type=True) for hook in value or ()}
    if isinstance(value, list | tuple):
        value = {str(index): item for index, item in enumerate(value)} or None
    if isinstance(value, Mapping) and value:
        flat: Flat = {}
        for key, item in value.items():
            flat.update(comparable_values(item, f'{path}.{key}'.lstrip('.')))
        return flat
    if _HOW.search(path):
        return {}
    if isinstance(value, str) and '/' in value:
        value = value.rstrip('/').rpartition('/')[-1]
    return {path: value}


def differences(there: Flat, asked: Flat, accept: Sequence[str] = ()) -> dict[str, str]:
    """Path to ``'6 there, 12 asked'``.

    A value that one config does not have and that is empty in the other (None, 0, '') is no difference,
    and neither is a hook of this package that only one has: both come with newer versions.

    Args:
        there: one config, flat.
        asked: the other.
        accept: paths, with or without the stage, under which differences do not count.
    """
    found = {}
    for path in {**there, **asked}:
        one, other = there.get(path, _ABSENT), asked.get(path, _ABSENT)
        if one == other or _is_accepted(path, accept):
            continue
        if _ABSENT in (one, other) and (
            not (other if one is _ABSENT else one) or _is_added_hook(path, there, asked)
        ):
            continue
        found[path] = f'{_text(one)} there, {_text(other)} asked'
    return found


def explain(there: Fingerprint, asked: Fingerprint, accept: Sequence[str] = ()) -> str:
    """In words why two fingerprints are not the same run; empty where they are.

    Top-level values that differ come first, since they usually explain the rest.
    """
    found = differences(there.run, asked.run, accept)
    if not found:
        return ''
    both = there.variables.keys() & asked.variables.keys()
    variables = {
        path: text
        for path, text in differences(there.variables, asked.variables, accept).items()
        if path in both
    }
    # epochs=12 shows in the loop and in the schedules too: once is enough.
    rest = {path: text for path, text in found.items() if text not in variables.values()}
    shown = [f'{path}: {text}' for path, text in {**variables, **rest}.items()]
    return '; '.join(shown[:SHOWN]) + (f'; {len(shown) - SHOWN} more' if shown[SHOWN:] else '')


def same_start(one: Fingerprint, other: Fingerprint, accept: Sequence[str] = ()) -> bool:
    """Whether one run may take stage 0 from the other."""
    return not differences(one.start, other.start, accept)


def _is_accepted(path: str, accept: Sequence[str]) -> bool:
    short = re.sub(r'^stage_\d+\.', '', path)
    return any(f'{candidate}.'.startswith(f'{prefix}.') for prefix in accept for candidate in (path, short))


def _is_added_hook(path: str, there: Flat, asked: Flat) -> bool:
    match = re.match(r'((?:.+\.)?custom_hooks\.(\w+))\.', path)
    if match is None or (f'{match[1]}.type' in there) == (f'{match[1]}.type' in asked):
        return False
    hook = HOOKS.get(match[2])
    return hook is not None and hook.__module__.startswith('mmseg_sats.')


def _text(value: Any) -> str:
    return 'absent' if value is _ABSENT else repr(value)
