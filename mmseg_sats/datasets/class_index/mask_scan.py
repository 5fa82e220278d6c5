# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Reading masks: one, or all of a data set by several processes, and which labels they hold."""

import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any, TypeVar

import mmcv
import numpy as np
from PIL.Image import DecompressionBombError
from rich.progress import track

_CHUNK = 32  # files per message between processes
_IN_PROCESS = 200  # fewer files than this are read faster than processes start
_SHOW_PROGRESS = 500  # about a second of work

Item, Result = TypeVar('Item'), TypeVar('Result')


def scan_masks(
    files: Sequence[str], workers: int | None = None, backend: str = 'pillow'
) -> np.ndarray:
    """Read masks and note their labels.

    Args:
        files: Paths of N masks.
        workers: Number of processes; defaults to the available cores, 16 at most.
        backend: Decoder, as in mmseg's ``LoadAnnotations``.

    Returns:
        (N, 32) uint8, presence of the labels as bits.

    Raises:
        FileNotFoundError: If a mask does not exist.
        ValueError: If a mask is unreadable or not single-channel 8-bit.
    """
    with map_in_processes(partial(_packed_labels, backend=backend), files, workers) as rows:
        if len(files) >= _SHOW_PROGRESS:
            rows = track(rows, description=f'reading the labels of {len(files)} masks', total=len(files))
        packed = np.empty((len(files), 32), np.uint8)
        # In a list, rows that are made between decoded masks would keep these masks' memory from being used again.
        for index, row in enumerate(rows):
            packed[index] = row
        return packed


def _packed_labels(file: str, backend: str) -> np.ndarray:
    return np.packbits(labels_of(file, backend))


@contextmanager
def map_in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Iterable[Result]]:
    """What ``work`` makes of each item, in their order, by several processes if there are many.

    Args:
        work: called with an item; it is not pickled, and may touch neither torch nor OpenMP.
        items: paths of files, or what names them.
        workers: Number of processes; defaults to the available cores, 16 at most.
    """
    workers = min(_available_cores(), 16) if workers is None else workers
    if len(items) < _IN_PROCESS or workers < 2 or not _may_fork():
        yield map(work, items)
        return
    # Forking after torch was imported is safe as long as the children touch neither torch nor
    # OpenMP. Spawned ones would first import the whole stack, for longer than the work takes;
    # threads wait for each other in the decoder. All processes are forked here, at the first
    # submission, before a progress bar starts its thread.
    workers = min(workers, -(-len(items) // _CHUNK))
    with ProcessPoolExecutor(workers, get_context('fork'), initializer=_keep_work, initargs=(work,)) as pool:
        yield pool.map(_call_work, items, chunksize=_CHUNK)


_work: list[Callable] = []  # of a child process


def _keep_work(work: Callable) -> None:
    _work.append(work)


def _call_work(item: Any) -> Any:
    return _work[-1](item)


def read_labels(file: str, backend: str = 'pillow') -> np.ndarray:
    """(H, W) uint8: one mask, decoded as mmseg's ``LoadAnnotations`` does.

    Raises:
        FileNotFoundError: If the mask does not exist.
        ValueError: If it is unreadable or not single-channel 8-bit.
    """
    expected = 'expected a single-channel 8-bit label image (PNG of mode L or P)'
    try:
        content = Path(file).read_bytes()
        seg = mmcv.imfrombytes(content, flag='unchanged', backend=backend)
    except FileNotFoundError:
        raise FileNotFoundError(f'mask {file} does not exist') from None
    except DecompressionBombError as error:
        raise ValueError(
            f'mask {file} is larger than Pillow decodes ({error}): expected tiles of it and of its image, or masks of '
            "mode L and LoadAnnotations(imdecode_backend='cv2') in the pipelines"
        ) from error
    # Pillow answers broken files with any of these.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f'mask {file} is unreadable ({error}); {expected}') from error
    if seg is None or seg.ndim != 2 or seg.dtype not in (np.uint8, bool):
        found = 'nothing' if seg is None else f'shape {seg.shape} of {seg.dtype}'
        raise ValueError(f'mask {file}: {expected}, found {found}')
    return seg


def labels_of(file: str, backend: str = 'pillow') -> np.ndarray:
    """(256,) bool: the labels that one mask holds, see :func:`read_labels`."""
    held = np.zeros(256, dtype=bool)
    # Looking up the first pixel of every run of equal ones takes half the time of counting all.
    pixels = read_labels(file, backend).ravel().astype(np.uint8, copy=False)
    held[pixels[:1]] = True
    held[pixels[1:][pixels[1:] != pixels[:-1]]] = True
    return held


def _available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _may_fork() -> bool:
    """Whether worker processes may be forked here."""
    # A daemonic process, such as a data loader's worker, may not have children; macOS' own
    # libraries do not survive a fork.
    return sys.platform == 'linux' and not current_process().daemon
