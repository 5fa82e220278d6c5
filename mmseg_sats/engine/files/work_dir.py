# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks of a work dir: whether it is in use, and belongs to the run that is resumed."""

import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.config.variables import evaluation_keys
from mmseg_sats.engine.files.earlier import in_current_names
from mmseg_sats.utils.config_keys import is_harmless, names

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None

_SHOWN = 8
# Seconds to wait for the lock: the workers of a killed process live some seconds longer and hold its lock.
PATIENCE = 10.0


class WorkDirBusyError(ValueError):
    """Raised if another process is training in the work dir."""


def check_unused(work_dir: Path) -> None:
    """Checks that no run has left stages in a work dir.

    Raises:
        ValueError: there are stages; the message lists them and says what to do.
    """
    found = [
        f'{folder.name} ({what})'
        for folder in sorted(work_dir.glob('stage_*'), key=lambda path: (len(path.name), path.name))
        if (what := _state(folder))
    ]
    if found:
        raise ValueError(
            f'{work_dir} is in use: it holds {", ".join(found)}. Resume that run (--resume), '
            'or name another work dir; nothing there is overwritten'
        )


@contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """A context that locks the work dir, so that no other process trains in it.

    The kernel locks the folder itself until the process and its workers have ended; no file is written. On
    a file system without locks it does nothing.

    Raises:
        WorkDirBusyError: another process is training in the work dir.
    """
    descriptor = os.open(work_dir, os.O_RDONLY)
    try:
        if fcntl and not _take(descriptor, time.monotonic() + PATIENCE):
            raise WorkDirBusyError(
                f'{work_dir}: another process is training in this work dir; wait for it, or name '
                'another'
            )
        yield
    finally:
        with suppress(OSError, AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # otherwise workers that still run would keep the lock
        os.close(descriptor)


def _take(descriptor: int, until: float) -> bool:
    with suppress(OSError):
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.2)
    return True  # the file system, e.g. NFS, cannot lock folders


def check_own_config(work_dir: Path, filename: str | None) -> None:
    """Checks that the run's ``config.py`` in the work dir would not overwrite the config that the user gave.

    If the work dir has stages, its ``config.py`` was written by a run, and may be given with ``--resume``.

    Raises:
        ValueError: the user's config would be overwritten.
    """
    kept = work_dir / 'config.py'
    used = any(work_dir.glob('stage_*'))
    if not used and filename and kept.exists() and Path(filename).exists() and kept.samefile(filename):
        raise ValueError(
            f'{filename} would be overwritten by the config that a run keeps in its work dir {work_dir}: '
            'expected another work dir'
        )


def _state(folder: Path) -> str:
    if (folder / 'done').exists():
        return 'finished'
    checkpoints = {path.name for path in folder.glob('*.pth')}
    return f'unfinished: {", ".join(sorted(checkpoints))}' if checkpoints else ''


def check_same_run(work_dir: Path, cfg: Config, stage: Config | None = None) -> str:
    """Checks that a run is resumed with the config that it was started with.

    What only the evaluation reads may differ, since it cannot change what is trained.

    Args:
        work_dir: the run's work dir; if the run was stopped very early, ``config.py`` may be missing.
        cfg: the config that the run is resumed with.
        stage: the config of its last stage, whose hooks tell whether ``test_pipeline`` counts in training too.

    Returns:
        A note on values of the evaluation that differ, for the log; empty if none does.

    Raises:
        FileNotFoundError: there are stages, but not the config that they were trained with.
        ValueError: that config cannot be read, or the two differ in a value that changes what is trained.
    """
    path = work_dir / 'config.py'
    if not path.exists():
        if any(work_dir.glob('stage_*/*.pth')):
            raise FileNotFoundError(
                f'{path} does not exist: without the config of the run that left its stages there, '
                'it cannot be gone on with'
            )
        return ''
    try:
        kept = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:
        raise ValueError(f'{path} is no config that can be read: {error}') from error
    there, now = _plain(kept), _plain(cfg)
    free = evaluation_keys(there, stage) & evaluation_keys(now, stage)
    differing = list(_differences(there, now))
    found = [what for key, what in differing if key not in free]
    if found:
        raise ValueError(_refusal(work_dir, found, {key for key, _ in differing if key not in free}))
    if not differing:
        return ''
    done = [folder.parent.name for folder in sorted(work_dir.glob('stage_*/metrics.json'))]
    kept_figures = (
        f' The finished stages ({", ".join(done)}) keep their figures; `mmseg-sats test {work_dir}` measures all of '
        'them as the config says now'
        if done
        else ''
    )
    changes = _some([what for _, what in differing])
    return f'the evaluation is not that of the run so far: {changes}. Training is the same.{kept_figures}'


def _refusal(work_dir: Path, found: Sequence[str], keys: Collection[str]) -> str:
    shared = sorted(key for key in keys if key in names(evaluates=True))
    hint = f' ({", ".join(shared)}: used in training too, not in the evaluation alone)' if shared else ''
    if 'test_pipeline' in shared and 'eval_pipeline' not in shared:
        hint = ' (test_pipeline is used by passes over training images too: set eval_pipeline for the evaluation alone)'
    start = work_dir / 'stage_0/snapshot.pth'
    base = f'; --base {start} starts it from the stage 0 that is there' if start.exists() else ''
    return (
        f'{work_dir} holds another run: {_some(found)}{hint}. To resume, give the config and options of that run, or '
        f'name another work dir{base}'
    )


def _some(texts: Sequence[str]) -> str:
    more = f'; and {len(texts) - _SHOWN} more' if len(texts) > _SHOWN else ''
    return f'{"; ".join(texts[:_SHOWN])}{more}'


def holds(path: Path, cfg: Config) -> bool:
    """Whether the config file of a run says the same as ``cfg``, but for ``resume``."""
    if not path.exists():
        return False
    kept = Config.fromfile(path, import_custom_modules=False)._cfg_dict.to_dict()
    given = cfg._cfg_dict.to_dict()
    return _listed(kept | dict(resume=None)) == _listed(given | dict(resume=None))


def _plain(cfg: Config) -> dict[str, Any]:
    return in_current_names(cfg._cfg_dict.to_dict())


def _differences(there: Any, now: Any, path: str = '') -> Iterator[tuple[str, str]]:
    """The top-level key and ``path: a there, b in the config`` for every value that differs and changes results."""
    if is_harmless(path):
        return
    if isinstance(there, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*there, *now)):
            where = f'{path}.{key}'.lstrip('.')
            yield from _differences(there.get(key), now.get(key), where)
    elif _listed(there) != _listed(now) and not _same_file(there, now):
        yield path.split('.')[0], f'{path}: {_short(there)} there, {_short(now)} in the config'


def _listed(value: Any) -> Any:
    """Turns tuples into lists, because a config file and the command line write them differently."""
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _same_file(there: Any, now: Any) -> bool:
    """Whether two strings, e.g. a relative and an absolute path, are paths of the same file or folder."""
    if not (isinstance(there, str) and isinstance(now, str) and there and now):
        return False
    return os.path.exists(now) and os.path.realpath(there) == os.path.realpath(now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
