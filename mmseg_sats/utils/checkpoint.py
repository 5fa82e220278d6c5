# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Reads and writes files that a later stage depends on: written completely or not at all, read without running code."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_TEMPORARY = '.tmp'


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> None:
    """Writes ``path`` through a temporary file beside it: write, fsync, rename.

    Args:
        path: the file to make or replace; its folder must exist.
        write: called with the open binary file.

    Raises:
        OSError: the file could not be written. A file that was at ``path`` before is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}{_TEMPORARY}')
    try:
        with temporary.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno, f'{path} was not written ({error.strerror or error}), what was there before is kept'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_temporary(folder: str | os.PathLike) -> None:
    """Removes the temporary files of interrupted writes from ``folder`` and the folders directly in it."""
    for pattern in (f'.*{_TEMPORARY}', f'*/.*{_TEMPORARY}'):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes sure that a rename in ``folder`` survives a power cut, where the file system supports it."""
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
    """Writes ``value`` as indented JSON, atomically. NaN raises ValueError: a missing number is written as null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the file is cut off or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:  # raised for invalid JSON and for invalid UTF-8
        raise ValueError(f'{path} is cut off or no JSON file: {error}') from error


def write_arrays(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes an ``.npz`` file, see :func:`write_atomically`."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_arrays(path: str | os.PathLike, names: Iterable[str], what: str) -> dict[str, torch.Tensor]:
    """Reads an ``.npz`` file without running code.

    Args:
        path: the file.
        names: of its arrays.
        what: what the file should hold, for the message.

    Raises:
        ValueError: it does not hold these arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f'{path} does not hold {what}: {error}') from error


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint and its checksum, each atomically.

    The checksum is written first, to ``<name>.sha256`` beside the checkpoint, in the format of
    ``sha256sum --check``. So a complete checkpoint always has its checksum.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()
    write_text(_checksum_file(path), f'{hashlib.sha256(content).hexdigest()}  {path.name}\n')
    write_atomically(path, lambda file: file.write(content))


def check_checksum(path: str | os.PathLike, required: bool = False) -> None:
    """Compares a checkpoint with its checksum.

    Args:
        path: the checkpoint.
        required: whether there must be a checksum; otherwise a file without one passes.

    Raises:
        ValueError: the file is not the one that was written.
    """
    noted = _checksum_file(Path(path))
    if not noted.is_file():
        if required:
            raise ValueError(f'{path} has no checksum beside it ({noted.name})')
        return
    expected = noted.read_text(errors='replace').split(' ')[0]
    found = _sha256(path)
    if found != expected:
        raise ValueError(
            f'{path} is damaged or is not the file that was written: its SHA-256 is {found}, '
            f'{noted.name} says {expected}'
        )


def _sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_name(f'{path.name}.sha256')


def _stands_for(name: str) -> Callable[[Any], Any]:
    """Makes a file that names the global ``name`` get the decorated object in its place.

    Since torch 2.6 an allow-list takes pairs of an object and a name; torch 2.4 and 2.5 look at these attributes alone.
    """

    def give_name(item: Any) -> Any:
        item.__module__, item.__qualname__ = name.rsplit('.', 1)
        item.__name__ = item.__qualname__
        return item

    return give_name


@_stands_for('mmengine.logging.history_buffer.HistoryBuffer')
class _History:
    """Replaces mmengine's log history while a file is read: it takes over only the numbers."""

    def __init__(self, *args: Any) -> None:
        self.buffer = HistoryBuffer()

    def __setstate__(self, state: Any) -> None:
        values, counts = (
            np.asarray(state[key]).tolist() for key in ('_log_history', '_count_history')
        )
        self.buffer = HistoryBuffer(values, counts, int(state['max_length']))


@_stands_for('builtins.getattr')
def _no_attribute(owner: Any, name: str) -> None:
    """Replaces ``getattr``, with which a file could reach any function."""


@_stands_for('_codecs.encode')
def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, as pickle's protocol 2 writes them. torch allows this by itself since torch 2.5."""
    return text.encode('latin1')


def _numpy_functions() -> list[Any]:
    """The two functions that rebuild arrays and numbers, under the names of numpy 1 and of numpy 2.

    So a checkpoint is read whichever numpy wrote it.
    """
    # The array's own pickling names the first one; numpy 1 has no `_core`, and numpy 2 warns about `core`.
    rebuild, scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    return [
        _stands_for(f'numpy.{core}.multiarray.{name}')(lambda *args, function=function: function(*args))
        for core in ('core', '_core')
        for name, function in (('_reconstruct', rebuild), ('scalar', scalar))
    ]


_ALLOWED = (
    _History,
    _no_attribute,
    _latin1,
    slice,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ('uint32', 'float64', 'int64')},
    *_numpy_functions(),
)
"""What a checkpoint of mmengine may name beside what torch allows by itself."""


@contextlib.contextmanager
def _only_allowed() -> Iterator[None]:
    """Within it, ``torch.load(weights_only=True)`` allows what is listed here, and nothing that others have added.

    ``torch.serialization.safe_globals`` would do, but torch 2.4 does not have it.
    """
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(_ALLOWED))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _refuse_other_readers(path: str | os.PathLike) -> None:
    """Refuses what ``torch.load`` gives to readers that heed no allow-list, though ``weights_only`` is set.

    Up to torch 2.5 these are TorchScript archives and tar files (CVE-2025-32434); newer ones refuse both by themselves.
    """
    if torch.__version__ >= (2, 6):
        return
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
    # torch's own reader, because another could find other records in a file that was made to mislead.
    if is_zip and 'constants.pkl' in torch._C.PyTorchFileReader(os.fspath(path)).get_all_records():
        raise ValueError('it is a TorchScript archive')
    if tarfile.is_tarfile(path):
        raise ValueError('it is a tar file')


# Errors that were observed while reading files that are cut off or of another kind.
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
    """Reads a checkpoint onto the CPU without ever running code that it contains.

    mmengine's loader falls back to full unpickling when the safe read fails, which is dangerous for
    files from other people.

    Args:
        path: a checkpoint of mmengine, or a bare state dict.

    Returns:
        The checkpoint as a dict with at least ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the file is cut off, damaged (see ``check_checksum``), not a checkpoint, or contains
            code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    check_checksum(path)
    try:
        _refuse_other_readers(path)
        with _only_allowed():
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except _READ_ERRORS as error:
        # torch goes on with advice to read the file unsafely.
        reason = str(error).strip().split('\n')[0].split(' Re-running')[0]
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
    _restore_histories(checkpoint)
    return dict(checkpoint, meta=checkpoint.get('meta') or {})


def _restore_histories(checkpoint: dict[str, Any]) -> None:
    hub = checkpoint.get('message_hub')
    scalars = hub.get('log_scalars') if isinstance(hub, dict) else None
    if isinstance(scalars, dict):
        for key, value in scalars.items():
            if isinstance(value, _History):
                scalars[key] = value.buffer
