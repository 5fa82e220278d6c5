# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the commands share: a config by its path or name, and values that override the config's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.checks.preflight import check_cfg_options
from mmseg_sats.engine.config.class_objects import name_classes
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.utils.installed import find_config

_SUFFIXES = ('.py', '.json', '.yaml', '.yml')
_EXAMPLE = 'sats/segformer_tiny_shapes_3-1'


def message_of(error: Exception) -> str:
    """The message of an error; for a KeyError without the quotes that ``str`` puts around it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Reads the config of a run and overrides some of its values.

    Args:
        path: the config file, or the name of one that comes with the package, such as ``sats/segformer_b2_voc_15-1``.
        options: dotted key to value, as ``--cfg-options`` gives them.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: the file is not a config, is only a base that other configs inherit from, or has a class in it that
            cannot be named.
        KeyError: the config does not have a key that an option sets; the message suggests a near match.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / 'config.py'
        hint = f', did you mean {inside}?' if inside.is_file() else ''
        raise FileNotFoundError(f'config {path} is a folder, expected a file{hint}')
    path = find_config(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f'{path} is no config: expected a file that ends in {", ".join(_SUFFIXES)}')
    cfg = Config.fromfile(path)
    name_classes(cfg)
    drop_own_scope(cfg)
    if cfg.get('model') is None:
        raise ValueError(
            f'{path} says nothing of a model: it is a part that configs inherit from, expected one '
            f'of a run, such as {_EXAMPLE}'
        )
    check_cfg_options(cfg, options or {})
    cfg.merge_from_dict(options or {})
    return cfg
