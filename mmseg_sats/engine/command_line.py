# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the commands share: a config by its path or name, and values that override the config's."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.checks.preflight import check_cfg_options
from mmseg_sats.engine.config.class_objects import name_classes
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.own_scope import drop_own_scope
from mmseg_sats.engine.config.stage_length import prefer_length
from mmseg_sats.utils.installed import find_config
from mmseg_sats.utils.user_modules import import_custom, read_file

_SUFFIXES = ('.py', '.json', '.yaml', '.yml')
_EXAMPLE = 'sats/segformer_tiny_shapes_3-1'


def message_of(error: Exception) -> str:
    """The message of an error; for a KeyError without the quotes that ``str`` puts around it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def read_config(given: str | Path | Config, options: Mapping[str, Any] | None = None) -> Config:
    """Reads the config of a run and overrides some of its values.

    Args:
        given: the config file, the name of one that comes with the package, such as ``sats/segformer_b2_voc_15-1``,
            or a config, which is left as it is.
        options: dotted key to value, as ``--cfg-options`` gives them.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: the file is not a config, or is only a base that other configs inherit from; a module that it
            names is not found or cannot be imported; a class in it cannot be named.
        KeyError: the config does not have a key that an option sets; the message suggests a near match.
    """
    cfg = copy.deepcopy(given) if isinstance(given, Config) else _read(Path(given))
    name_classes(cfg)
    drop_own_scope(cfg)
    if cfg.get('model') is None:
        raise ValueError(
            f'{cfg.filename or "the config"} says nothing of a model: it is a part that configs inherit from, expected '
            f'one of a run, such as {_EXAMPLE}'
        )
    check_cfg_options(cfg, options or {})
    prefer_length(cfg, options or {})
    cfg.merge_from_dict(options or {})
    import_custom(cfg)  # the options may name modules too
    return cfg


def _read(path: Path) -> Config:
    if path.is_dir():
        inside = path / 'config.py'
        hint = f', did you mean {inside}?' if inside.is_file() else ''
        raise FileNotFoundError(f'config {path} is a folder, expected a file{hint}')
    path = find_config(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f'{path} is no config: expected a file that ends in {", ".join(_SUFFIXES)}')
    return read_file(path)


def run_config(
    config: str | Path | Config,
    options: Mapping[str, Any] | None = None,
    *,
    work_dir: str | Path | None = None,
    resume: bool = False,
    base: str | Path | None = None,
    amp: bool = False,
    launcher: str = 'none',
) -> Config:
    """The config of a run as ``mmseg-sats train`` has it.

    Args:
        config: its file, the name of one that comes with the package, or the config itself.
        options: values that replace the config's, by dotted key.
        work_dir: where the run writes; by default the config's, else ``work_dirs/METHOD/CONFIG``.
        resume: whether to continue the run in the work dir.
        base: a checkpoint from which stage 0 is taken.
        amp: mixed precision in float16 with loss scaling, which mmengine has for GPUs alone.
        launcher: how the processes of the run were started.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: it is not the config of a run.
        KeyError: an option sets a key that the config does not have.
    """
    cfg = read_config(config, options)
    set_defaults(cfg)
    cfg.work_dir = str(work_dir or cfg.work_dir)
    cfg.launcher = launcher
    cfg.resume = resume or cfg.get('resume', False)
    cfg.base = str(base) if base else cfg.get('base')
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    return cfg
