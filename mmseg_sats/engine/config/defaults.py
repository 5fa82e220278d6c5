# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Defaults for keys that a run's config may leave out: ``method``, ``memory`` and ``work_dir``."""

from pathlib import Path

from mmengine.config import Config


def set_defaults(cfg: Config) -> None:
    """Sets the keys that the config leaves out, in place.

    ``method`` is the name of the config's folder in the path that was given (or of the file, if the path has
    no folder), ``memory`` is 0, and ``work_dir`` is ``work_dirs/FOLDER/CONFIG``. They are written into the
    config in the work dir, so that they do not change if that file is moved.

    Args:
        cfg: a run's config. One that was not read from a file is called ``unnamed``.
    """
    path = Path(cfg.filename or 'unnamed')
    cfg.work_dir = cfg.get('work_dir') or str(Path('work_dirs', path.parent.name, path.stem))
    cfg.setdefault('method', path.parent.name or path.stem)
    cfg.setdefault('memory', 0)
