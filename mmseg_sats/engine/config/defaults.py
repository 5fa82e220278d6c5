# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a run's config need not say: its method's name, its memory, where it writes."""

from pathlib import Path

from mmengine.config import Config


def set_defaults(cfg: Config) -> None:
    """Fills in what the config leaves open, in place.

    ``method`` is the name of the folder in the path by which the config was named (without a folder, of the
    file), ``memory`` is 0, ``work_dir`` is ``work_dirs/FOLDER/CONFIG``. The config that a run keeps has them
    written out, so that they do not depend on where it lies.

    Args:
        cfg: a run's config; one that was not read from a file is called ``unnamed``.
    """
    path = Path(cfg.filename or 'unnamed')
    cfg.work_dir = cfg.get('work_dir') or str(Path('work_dirs', path.parent.name, path.stem))
    cfg.setdefault('method', path.parent.name or path.stem)
    cfg.setdefault('memory', 0)
