# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Classes themselves in a config, where text configs have their names: ``type=MyLoss`` for ``type='MyLoss'``."""

from inspect import isclass, isroutine
from typing import Any

import mmseg.registry
from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string


def name_classes(cfg: Config) -> None:
    """Puts names in the place of classes and functions that are a ``type``, in place.

    They come from a config that was made in Python, or from a file in mmengine's newer style, which imports them.
    The runner looks parts up by name, and only names can be written to ``config.py``, which is read again on
    resuming, by the report and by stock mmseg. A name is the registered one or, for what is not registered, the
    path of its import, which mmengine's registries take too.

    Args:
        cfg: a config as it was read or made.

    Raises:
        ValueError: there is a class or function that no import finds, or that is not a ``type``.
    """
    # to_dict makes paths of what a file in the newer style has imported.
    content = cfg.to_dict() if cfg._imported_names else cfg._cfg_dict
    if cfg._imported_names or _has_objects(content):
        object.__setattr__(cfg, '_cfg_dict', ConfigDict(_named(content, '', imported=bool(cfg._imported_names))))
        object.__setattr__(cfg, '_imported_names', set())


def _has_objects(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_objects(item) for item in dict.values(value))
    if isinstance(value, list | tuple):
        return any(_has_objects(item) for item in value)
    return isclass(value) or isroutine(value)


def _named(value: Any, where: str, imported: bool) -> Any:
    """A copy of ``value``, which stands in the config at ``where``, with names in it."""
    if isinstance(value, dict):
        return {
            key: _named(item, f'{where}.{key}' if where else str(key), imported) for key, item in dict.items(value)
        }
    if isinstance(value, list | tuple):
        return type(value)(_named(item, f'{where}[{index}]', imported) for index, item in enumerate(value))
    is_type = where.rpartition('.')[2] in ('type', 'runner_type')
    if isclass(value) or isroutine(value):
        return _name(value, where, is_type)
    if imported and is_type and isinstance(value, str) and '.' in value:
        return _registered(get_object_from_string(value)) or value
    return value


def _name(item: Any, where: str, is_type: bool) -> str:
    path = f'{item.__module__}.{item.__qualname__}'
    kind = 'class' if isclass(item) else 'function'
    if not is_type:
        raise ValueError(
            f'{where} is the {kind} {path}: in a config a class or function may only be a `type`, since config.py '
            'holds its name'
        )
    if name := _registered(item):
        return name
    # A script's own __main__ is another module in the process that reads config.py.
    if item.__module__ == '__main__' or get_object_from_string(path) is not item:
        raise ValueError(
            f'{where} is the {kind} {path}, which no import finds, so that config.py cannot name it: register it '
            "in one of mmseg's registries, or move it to a module that can be imported"
        )
    return path


def _registered(item: Any) -> str | None:
    """The name under which one of mmseg's registries, or of mmengine's above them, finds a class or function."""
    for registry in vars(mmseg.registry).values():
        if isinstance(registry, Registry):
            for one in filter(None, (registry, registry.parent)):
                for name, registered in one.module_dict.items():
                    if registered is item and registry.get(name) is item:
                        return name
    return None
