# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Variables of a config: a string ``'$name'`` anywhere in it stands for a value.

The value is one of the config's own top-level values (``data_root``, ``epochs``, ``crop_size``,
``batch_size``, ``seed``, ``protocol`` and any other that a config defines), or one that only the stage
knows (``STAGE_VARIABLES``). So one ``--cfg-options epochs=3`` reaches schedule, data and model of every
stage.
"""

import re
from typing import Any

from mmengine.config import Config

from mmseg_sats.utils.deprecation import warn_renamed
from mmseg_sats.utils.spelling import near_match

STAGE_VARIABLES = {
    'stage': 'index of the stage',
    'num_channels': "channels of the stage's model, background included",
    'num_old': 'channels of the old model, background included (1 in stage 0)',
    'crop_scale': "mmseg's image scale whose short side is the crop, (4 w, h)",
    'crop_wh': 'the crop as (w, h), which CenterCrop wants',
}
# What earlier versions called them.
RENAMED_VARIABLES = {'num_classes': 'num_channels', 'num_old_classes': 'num_old'}
_VARIABLE = re.compile(r'^\$(\w+)$')


def config_variables(cfg: Config) -> dict[str, Any]:
    """The top-level values of ``cfg``, all of which may be used as variables, ``crop_size`` as (h, w)."""
    variables = dict(cfg._cfg_dict.to_dict())
    size = variables.get('crop_size')
    if isinstance(size, int):
        variables['crop_size'] = (size, size)
    elif size is not None:
        variables['crop_size'] = tuple(size)
    if size is not None:
        height, width = variables['crop_size']
        variables.update(crop_scale=(4 * width, height), crop_wh=(width, height))
    return variables


def resolve_variables(
    value: Any, variables: dict[str, Any], path: str = '', seen: tuple[str, ...] = ()
) -> Any:
    """A copy of ``value`` in which every ``'$name'`` is replaced.

    Args:
        value: any nesting of dicts, lists, tuples and plain values.
        variables: what the variables stand for.
        path: where ``value`` stands in the config, for messages.
        seen: the variables that led here, so that a circle is found.

    Raises:
        KeyError: a variable that is not defined, with the key it stands at.
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
