# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The training loop's workers, which load batches: how they start, and that they end with the process."""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader


def start_worker(inner: Any, worker_id: int) -> None:
    """Makes a worker ignore the first SIGTERM, since its batch is needed for the last iteration.

    A cluster signals every process of a job. The second signal, as from a loader that shuts down a
    worker that does not end by itself, works as usual. See also :func:`_end_workers`.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if inner is not None:
        inner(worker_id)


_workers: WeakSet[multiprocessing.process.BaseProcess] = WeakSet()
_at_the_end: Finalize | None = None


def started(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, its workers noted."""
    global _at_the_end
    if _at_the_end is None or not _at_the_end.still_active():  # a forked process has none
        # Priority 0: before multiprocessing ends the daemons, after it closed its pools.
        _at_the_end = Finalize(None, _end_workers, exitpriority=0)
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    _workers.update(set(multiprocessing.active_children()) - before)
    return iterator


def _end_workers() -> None:
    """Ends the loops' workers when the process ends, for whatever reason; no batch is needed then.

    If SIGTERM, Ctrl-C or an error ends a run, the loop's iterators live until the process ends. Then
    multiprocessing sends each worker one SIGTERM, which our workers ignore, and would wait for ever.
    """
    living = [child for child in multiprocessing.active_children() if child in _workers]
    if living:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's end for an error
    for worker in living:
        worker.kill()
