# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Defaults for keys that a run's config may leave out: ``method``, ``memory``, ``work_dir`` and hooks."""

import copy
from functools import cache
from pathlib import Path

from mmengine.config import Config

from mmseg_sats.utils.installed import CONFIGS


def set_defaults(cfg: Config) -> None:
    """Sets the keys that the config leaves out, in place.

    ``method`` is the name of the config's folder in the path that was given (or of the file, if the path has
    no folder), ``memory`` is 0, and ``work_dir`` is ``work_dirs/FOLDER/CONFIG``. They are written into the
    config in the work dir, so that they do not change if that file is moved.

    A config that trains gets each of the ``default_hooks`` of ``configs/_base_/default_hooks.py`` of which it names
    none, and that file's ``test_cfg``: mmseg's own schedules have hooks, but none that stops at numbers that are not
    finite.

    Args:
        cfg: a run's config. One that was not read from a file is called ``unnamed``.
    """
    path = Path(cfg.filename or 'unnamed')
    cfg.work_dir = cfg.get('work_dir') or str(Path('work_dirs', path.parent.name, path.stem))
    cfg.setdefault('method', path.parent.name or path.stem)
    cfg.setdefault('memory', 0)
    if cfg.get('train_cfg'):
        _add_hooks(cfg)


def _add_hooks(cfg: Config) -> None:
    ours = copy.deepcopy(own_hooks())
    cfg.setdefault('test_cfg', ours.test_cfg)
    if 'checkpoint_iters' not in cfg:
        del ours.default_hooks.checkpoint.iters
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = {}
    for name, hook in ours.default_hooks.items():
        cfg.default_hooks.setdefault(name, hook)


@cache
def own_hooks() -> Config:
    """``configs/_base_/default_hooks.py``; not to be changed."""
    return Config.fromfile(CONFIGS / '_base_' / 'default_hooks.py')
