# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A work dir that is in use: what stands there, and whether a run may go on with it."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.config.earlier import in_current_names
from mmseg_sats.utils.config_keys import is_harmless

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_SHOWN = 8
# Loaders' workers outlive a killed process by some seconds, and its lock with them.
PATIENCE = 10.0


class WorkDirBusyError(ValueError):
    """Another process trains in the work dir."""


def check_writable(work_dir: Path) -> None:
    """Finds out whether files can be made in ``work_dir`` or in what it will be made in.

    Raises:
        OSError: they cannot.
    """
    place = next(path for path in (work_dir, *work_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f'work dir {work_dir} cannot be written to: {error.strerror} ({place}); '
            'expected a folder of your own, named by --work-dir',
        ) from error


def check_unused(work_dir: Path) -> None:
    """Refuses a work dir that a run has left something in.

    Raises:
        ValueError: what stands there, and what to do.
    """
    found = [
        f'{folder.name} ({what})'
        for folder in sorted(work_dir.glob('stage_*'), key=lambda path: (len(path.name), path.name))
        if (what := _state(folder))
    ]
    if found:
        raise ValueError(
            f'{work_dir} is in use: it holds {", ".join(found)}. Pass --resume to go on with that '
            'run, or name another --work-dir; nothing there is overwritten'
        )


@contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """Within it no other process may train in the folder; where the file system knows no locks, nothing happens.

    It is the folder that the kernel locks, until the process and its workers have ended: nothing is written.

    Raises:
        WorkDirBusyError: another process trains there.
    """
    descriptor = os.open(work_dir, os.O_RDONLY)
    try:
        if fcntl and not _take(descriptor, time.monotonic() + PATIENCE):
            raise WorkDirBusyError(
                f'{work_dir}: another process is training in this work dir; wait for it, or name another --work-dir'
            )
        yield
    finally:
        with suppress(OSError, AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # else workers that still live would keep it
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
    return True  # e.g. NFS, which locks no folders


def check_own_config(work_dir: Path, filename: str | None) -> None:
    """Refuses a work dir in which the run's ``config.py`` would take the place of the user's own.

    The one that a run has kept there is the same again, and may be given with ``--resume``.

    Raises:
        ValueError: what would be overwritten.
    """
    kept = work_dir / 'config.py'
    used = any(work_dir.glob('stage_*'))
    if not used and filename and kept.exists() and Path(filename).exists() and kept.samefile(filename):
        raise ValueError(
            f'{filename} would be overwritten by the config that a run keeps in its work dir {work_dir}: '
            'expected another --work-dir'
        )


def _state(folder: Path) -> str:
    if (folder / 'done').exists():
        return 'finished'
    checkpoints = {path.name for path in folder.glob('*.pth')}
    return f'unfinished: {", ".join(sorted(checkpoints))}' if checkpoints else ''


def check_same_run(work_dir: Path, cfg: Config) -> None:
    """Refuses to go on with a run under a config that would have made another one of it.

    Args:
        work_dir: with the run's ``config.py``, if it got that far.
        cfg: the config now.

    Raises:
        FileNotFoundError: stages without the config that they were made with.
        ValueError: that config cannot be read, or the two differ where it matters.
    """
    path = work_dir / 'config.py'
    if not path.exists():
        if any(work_dir.glob('stage_*/*.pth')):
            raise FileNotFoundError(
                f'{path} does not exist: without the config of the run that left its stages there, '
                'it cannot be gone on with'
            )
        return
    try:
        kept = Config.fromfile(path)
    except Exception as error:
        raise ValueError(f'{path} is no config that can be read: {error}') from error
    found = list(_differences(_plain(kept), _plain(cfg)))
    if found:
        more = f'; and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
        raise ValueError(
            f'{work_dir} holds another run: {"; ".join(found[:_SHOWN])}{more}. Give --resume the '
            'config and options of that run, or name another --work-dir'
        )


def _plain(cfg: Config) -> dict[str, Any]:
    return in_current_names(cfg._cfg_dict.to_dict())


def _differences(there: Any, now: Any, path: str = '') -> Iterator[str]:
    """``path: a there, b in the config`` for every value that differs and matters."""
    if is_harmless(path):
        return
    if isinstance(there, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*there, *now)):
            where = f'{path}.{key}'.lstrip('.')
            yield from _differences(there.get(key), now.get(key), where)
    elif _listed(there) != _listed(now) and not _same_file(there, now):
        yield f'{path}: {_short(there)} there, {_short(now)} in the config'


def _listed(value: Any) -> Any:
    """Tuples as lists: a config file and the command line spell them differently."""
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _same_file(there: Any, now: Any) -> bool:
    """Whether two texts, e.g. a relative and an absolute path, lead to one file or folder."""
    if not (isinstance(there, str) and isinstance(now, str) and there and now):
        return False
    return os.path.exists(now) and os.path.realpath(there) == os.path.realpath(now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
