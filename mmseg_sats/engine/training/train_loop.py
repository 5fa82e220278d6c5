# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""An epoch loop that resumes at the iteration at which it was stopped, with the same result."""

import itertools
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakSet

import torch
from mmengine.dist import all_reduce, barrier, is_distributed
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmseg_sats.utils.randomness import seed_all

# What a shell reports of a process that SIGTERM ended.
EXIT_PREEMPTED = 128 + signal.SIGTERM


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop, resumable at every iteration, bit for bit on a CPU.

    A checkpoint's epoch and iteration say where in the epoch to go on: the sampler gives the epoch's
    order again and the batches before that place are left out, unread. The generators of Python,
    NumPy and torch are set from (seed, stage, iteration) before every iteration, and the data set
    draws from (seed, stage, epoch, index); so there is no other state to restore, on any rank.

    SIGTERM, which clusters send before they stop a job, ends the run after the current iteration:
    hooks with ``before_stop(runner)`` are called, which is when ``AtomicCheckpointHook`` writes, and
    the process exits with ``EXIT_PREEMPTED`` (143). Between epochs, for example during validation, it
    ends the process at once; the checkpoint of the epoch exists already.

    Args:
        runner, dataloader, max_epochs, options: as in mmengine's ``EpochBasedTrainLoop``.
    """

    def __init__(self, runner: Any, dataloader: Any, max_epochs: int, **options: Any) -> None:
        super().__init__(runner, dataloader, max_epochs, **options)
        self._stop_asked = False
        self.dataloader.worker_init_fn = partial(_start_worker, self.dataloader.worker_init_fn)

    def run(self) -> nn.Module:
        """Trains to the last epoch, from wherever the counters stand."""
        metainfo = getattr(self.dataloader.dataset, 'metainfo', {})
        # Only now: resuming may have brought another seed.
        self._key = (self.runner.seed, metainfo.get('stage', 0))
        return super().run()

    def run_epoch(self) -> None:
        """One epoch, or what is left of it."""
        with self._watching_for_sigterm():
            self._run_epoch()
            # The signal may have come while the epoch's checkpoint was being written.
            self._stop_if_asked()

    def _run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        set_epoch(self.dataloader.dataset, self._epoch)
        done = self._iter - self._epoch * len(self.dataloader)
        self._check_position(done)
        # Samplers that draw from torch's own generator give the epoch's order again, too.
        seed_all(*self._key, 0, self._epoch)
        for index, batch in enumerate(self._batches(done), start=done):
            self.run_iter(index, batch)
        seed_all(*self._key, 1, self._epoch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """One iteration; then the end of the run if SIGTERM came."""
        seed_all(*self._key, 2, self._iter)
        super().run_iter(idx, data_batch)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self._must_stop():
            self.runner.call_hook('before_stop')
            # torchrun and slurm end all processes when the first one ends; wait until none is writing.
            barrier()
            self.runner.logger.info(
                f'stopped by SIGTERM behind iteration {self._iter}: go on with --resume'
            )
            raise SystemExit(EXIT_PREEMPTED)

    def _batches(self, done: int) -> Iterator[Any]:
        """The epoch's batches behind the first ``done``, which are not loaded."""
        if done == 0:
            return _started(self.dataloader)
        loader = self.dataloader
        left = list(itertools.islice(loader.batch_sampler, done, None))
        if not left:
            return iter(())
        rest = DataLoader(
            loader.dataset,
            batch_sampler=left,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )
        return _started(rest)

    def _check_position(self, done: int) -> None:
        if not 0 <= done <= len(self.dataloader):
            raise ValueError(
                f'the checkpoint stands at iteration {self._iter} of epoch {self._epoch}, which does '
                f'not fit epochs of {len(self.dataloader)} iterations: data, batch size and number of '
                'processes must be those of the run that wrote it'
            )

    def _must_stop(self) -> bool:
        if not is_distributed():
            return self._stop_asked
        # All ranks stop after the same iteration, whichever of them got the signal.
        device = next(self.runner.model.parameters()).device
        asked = torch.tensor(int(self._stop_asked), device=device)
        all_reduce(asked, 'max')
        return bool(asked)

    @contextmanager
    def _watching_for_sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals only to the main thread.
            return
        before = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True


def set_epoch(dataset: Dataset, epoch: int) -> None:
    """Calls ``set_epoch`` of a data set, or of those that it joins, where there is such a method."""
    for part in getattr(dataset, 'datasets', None) or [dataset]:
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


def _start_worker(inner: Any, worker_id: int) -> None:
    """Makes a worker ignore the first SIGTERM, since its batch is needed for the last iteration.

    A cluster signals every process of a job. The second signal, as from a loader that shuts down a
    worker that does not end by itself, works as usual. See also :func:`_end_workers`.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if inner is not None:
        inner(worker_id)


_workers: WeakSet[multiprocessing.process.BaseProcess] = WeakSet()
_at_the_end: Finalize | None = None


def _started(loader: DataLoader) -> Iterator[Any]:
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
