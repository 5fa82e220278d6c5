# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Values per class in the losses of the heads, such as weights, which are cut to the classes of a stage."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mmengine
from mmengine.config import ConfigDict

from mmseg_sats.protocol import Stage
from mmseg_sats.utils.spelling import near_match

# The arguments of mmseg's losses that have a value for each class, where they are no single number.
PER_CLASS = ('class_weight', 'alpha')
_REST = 1.0


def cut_to_stage(
    heads: Mapping[str, ConfigDict], stage: Stage, num_labels: int, names: Callable[[], Sequence[str]], unknown: bool
) -> None:
    """Cuts every list of values per class in the losses of the heads to the channels of a stage, in place.

    A list has one value for each class of the data set, background first, in the order of the class ids. A
    dict has values by class name; the other classes have 1. A string is a file that mmengine reads, as mmseg
    allows.

    Args:
        heads: configs of the heads by their path in the config.
        stage: the stage.
        num_labels: how many classes the data set has, background included.
        names: gives the names of these classes; called only if a dict needs them.
        unknown: whether the heads' losses have an unknown class behind the channels; its value is 1.

    Raises:
        ValueError: a list has another length.
        KeyError: a dict names a class that the data set does not have.
    """
    for path, owner, key in [found for name, head in heads.items() for found in _values(name, head.get('loss_decode'))]:
        given = owner[key]
        values = mmengine.load(given) if isinstance(given, str) else given
        if isinstance(values, Mapping):
            values = _by_name(path, values, names())
        if len(values) != num_labels:
            raise ValueError(
                f'{path} has {len(values)} values: expected one for each of the {num_labels} classes of the data set, '
                'background first, also of those that a later stage learns, or a dict by class name'
            )
        owner[key] = [float(values[c]) for c in (0, *stage.seen)] + [_REST] * unknown


def _values(path: str, loss: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    losses = loss if isinstance(loss, list | tuple) else [loss]
    for index, one in enumerate(losses):
        where = f'{path}.loss_decode' + (f'[{index}]' if one is not loss else '')
        for key in PER_CLASS if isinstance(one, dict) else ():
            if isinstance(one.get(key), list | tuple | dict | str):
                yield f'{where}.{key}', one, key


def _by_name(path: str, values: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    for name in values:
        if name not in names:
            close = near_match(name, names)
            raise KeyError(f'{path}: the data set has no class {name!r}{close}; expected {list(names)}')
    return [values.get(name, _REST) for name in names]
