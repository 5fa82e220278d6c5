# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The arguments that all command-line tools share: the path of a config, and options that override its values."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mmseg_sats.engine.checks.preflight import check_cfg_options

_SUFFIXES = ('.py', '.json', '.yaml', '.yml')
_EXAMPLE = 'configs/sats/segformer_tiny_shapes_3-1.py'


class _Options(DictAction):
    """mmengine's ``DictAction``, with an error message for an argument that is not KEY=VALUE."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for word in values:
            if '=' not in word:
                parser.error(f'{option_string} {word}: expected KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options K=V ...``, which is parsed to a dict by dotted key, or None if it is not given."""
    parser.add_argument(
        '--cfg-options', nargs='+', action=_Options, metavar='K=V', help='override config values'
    )


def message_of(error: Exception) -> str:
    """The message of an error; for a KeyError without the quotes that ``str`` puts around it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Reads the config of a run and overrides some of its values.

    Args:
        path: the config file.
        options: dotted key to value, as ``--cfg-options`` gives them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a config, or is only a base that other configs inherit from.
        KeyError: the config does not have a key that an option sets; the message suggests a near match.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / 'config.py'
        hint = f', did you mean {inside}?' if inside.is_file() else ''
        raise FileNotFoundError(f'config {path} is a folder, expected a file{hint}')
    if not path.is_file():
        raise FileNotFoundError(f'config {path} does not exist')
    if path.suffix not in _SUFFIXES:
        raise ValueError(f'{path} is no config: expected a file that ends in {", ".join(_SUFFIXES)}')
    cfg = Config.fromfile(path)
    if cfg.get('model') is None:
        raise ValueError(
            f'{path} says nothing of a model: it is a part that configs inherit from, expected one '
            f'of a run, such as {_EXAMPLE}'
        )
    check_cfg_options(cfg, options or {})
    cfg.merge_from_dict(options or {})
    return cfg
