# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Files that a later stage depends on: written whole or not at all, read without running code."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import get_torch_safe_globals


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> None:
    """Writes ``path`` through a temporary file beside it: write, fsync, rename.

    Args:
        path: the file to make or replace; its folder must exist.
        write: called with the open binary file.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` outlast a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems cannot sync a folder; the rename itself is still atomic.
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN is refused: absent numbers are null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


class _Unread:
    """Stands in for mmengine's log history, which nobody here needs."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_attribute(owner: Any, name: str) -> None:
    """Stands in for ``getattr``, through which a file could reach any function."""


def _harmless_globals() -> list[Any]:
    """What a checkpoint of mmengine may name, the two names that reach further replaced."""
    allowed = [item for item in get_torch_safe_globals() if item not in (getattr, HistoryBuffer)]
    return [
        *allowed,
        (_Unread, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_no_attribute, 'builtins.getattr'),
    ]


# What reading a cut-off or foreign file was seen to raise.
_READ_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    IndexError,
    KeyError,
    AssertionError,
    AttributeError,
    TypeError,
    struct.error,
)


def load_checkpoint_safely(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without ever running code out of it.

    mmengine's loader falls back to full unpickling when the safe read fails; a file from somewhere
    else must never get there.

    Args:
        path: a checkpoint of mmengine, or a bare state dict.

    Returns:
        The checkpoint as a dict with at least ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: the file is cut off, not a checkpoint, or carries code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except _READ_ERRORS as error:
        reason = str(error).strip().split('\n')[0]
        raise ValueError(
            f'{path} is not a checkpoint that can be read safely (cut off, another kind of file, '
            f'or one that carries code): {reason}'
        ) from error
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    state_dict = checkpoint['state_dict'] if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict):
        raise ValueError(
            f'{path} holds a {type(state_dict).__name__}, expected a dict of tensors (state_dict)'
        )
    return dict(checkpoint, meta=checkpoint.get('meta') or {})
