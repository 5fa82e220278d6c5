# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Variables of a config: a string ``'$name'`` anywhere in it is replaced by a value.

The value is that of a top-level key of the config (``data_root``, ``epochs``, ``crop_size``,
``batch_size``, ``seed``, ``protocol`` or any other that the config defines), or one that depends on the
stage (``STAGE_VARIABLES``). So a single ``--cfg-options epochs=3`` changes the schedule, data and model of
every stage.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from mmseg_sats.utils.config_keys import names
from mmseg_sats.utils.spelling import near_match, warn_renamed

STAGE_VARIABLES = {
    'stage': 'index of the stage',
    'num_channels': "channels of the stage's model, background included",
    'num_old': 'channels of the old model, background included (1 in stage 0)',
    'num_future': 'classes of later stages',
    'crop_scale': "mmseg's image scale whose short side is the crop, (4 w, h)",
    'crop_wh': 'the crop as (w, h), which CenterCrop wants',
}
# Names of variables in earlier versions, and their names now.
RENAMED_VARIABLES = {'num_classes': 'num_channels', 'num_old_classes': 'num_old'}
_VARIABLE = re.compile(r'^\$(\w+)$')
# Hooks that show the model the training images with the test_pipeline, before or after a training.
_PASSES = ('PseudoLabelThresholdHook', 'PrototypeHook', 'NewRowsHook')


def config_variables(cfg: Config) -> dict[str, Any]:
    """The values of the top-level keys of ``cfg``, all of which are variables; ``crop_size`` is made (h, w)."""
    variables = dict(cfg._cfg_dict.to_dict())
    # A data set's file may set these, so the recipes cannot: two bases of a config must not set the same key.
    variables.update(
        background=cfg.get('background'),
        no_background=cfg.get('no_background', False),
        mask_values=dict(cfg.get('mask_values') or {}),
        mask_root=cfg.get('mask_root'),
    )
    size = variables.get('crop_size')
    if isinstance(size, int):
        variables['crop_size'] = (size, size)
    elif size is not None:
        variables['crop_size'] = tuple(size)
    if size is not None:
        height, width = variables['crop_size']
        variables.update(crop_scale=(4 * width, height), crop_wh=(width, height))
    return variables


def variables_in(value: Any) -> Iterator[str]:
    """The names of all variables (``'$name'``) that a config uses."""
    if isinstance(value, dict):
        for item in value.values():
            yield from variables_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from variables_in(item)
    elif isinstance(value, str) and (match := _VARIABLE.match(value)):
        yield match[1]


def evaluation_keys(content: Mapping[str, Any], stage: Config | None = None) -> set[str]:
    """The top-level keys of a run's config that have an effect on its evaluation alone.

    Args:
        content: the run's config.
        stage: the config of a later stage; None: it is unknown which hooks it has.
    """
    if content.get('held_out') is not None:
        return set()  # the evaluation chooses the epoch
    keys = set(names(evaluates=True))
    hooks = [hook.get('type') for hook in (stage.get('custom_hooks') or [])] if stage is not None else _PASSES
    if any(getattr(hook, '__name__', hook) in _PASSES for hook in hooks):
        keys.discard('test_pipeline')
    # Whatever another key uses as $name is not read by the evaluation alone, nor is what that uses.
    while used := keys.intersection(variables_in({key: value for key, value in content.items() if key not in keys})):
        keys -= used
    return keys


def resolve_variables(
    value: Any, variables: dict[str, Any], path: str = '', seen: tuple[str, ...] = ()
) -> Any:
    """A copy of ``value`` in which every ``'$name'`` is replaced.

    Args:
        value: any nesting of dicts, lists, tuples and plain values.
        variables: the value of each variable.
        path: the dotted path of ``value`` in the config, for messages.
        seen: the variables that are being resolved, so that one that refers to itself is found.

    Raises:
        KeyError: a variable is not defined or refers to itself; the message has its path.
    """
    if isinstance(value, dict):
        return {
            key: resolve_variables(item, variables, f'{path}.{key}'.lstrip('.'), seen)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(
            resolve_variables(item, variables, f'{path}[{i}]', seen) for i, item in enumerate(value)
        )
    match = _VARIABLE.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    name = match[1]
    if name not in variables and RENAMED_VARIABLES.get(name) in variables:
        warn_renamed(f'${name}', f'${RENAMED_VARIABLES[name]}')
        name = RENAMED_VARIABLES[name]
    if name not in variables:
        raise KeyError(
            f'{path}={value!r}: the config defines no {name!r}{near_match(name, variables)}; '
            f'expected one of {sorted(variables)}'
        )
    if name in seen:
        raise KeyError(f'{path}={value!r} stands for itself: {" -> ".join((*seen, name))}')
    return resolve_variables(variables[name], variables, path, (*seen, name))
