# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A training loop that resumes at the iteration at which it was stopped, with the same result."""

import bisect
import itertools
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_rank, is_distributed
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmseg_sats.engine.training.workers import start_worker, started
from mmseg_sats.utils.randomness import seed_all

# What a shell reports of a process that SIGTERM ended.
EXIT_PREEMPTED = 128 + signal.SIGTERM


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop, resumable at every iteration, bit for bit on a CPU, and for iterations too.

    A checkpoint's epoch and iteration say where in the epoch to go on: the sampler gives the epoch's
    order again and the batches before that place are left out, unread. The generators of Python,
    NumPy and torch are set from (seed, stage, iteration) before every iteration, and the data set
    draws from (seed, stage, epoch, index); so there is no other state to restore, on any rank.

    With ``max_iters`` the epochs are passes over the data, of which the last one ends at that iteration;
    ``val_begin``, ``val_interval`` and ``dynamic_intervals`` count iterations, and so does ``batch_idx``
    in hooks, as in mmengine's ``IterBasedTrainLoop``.

    SIGTERM, which clusters send before they stop a job, ends the run after the current iteration:
    hooks with ``before_stop(runner)`` are called, which is when ``AtomicCheckpointHook`` writes, and
    the process exits with ``EXIT_PREEMPTED`` (143). Between epochs and during validation it ends the
    process at once; the checkpoint of that place exists already.

    Args:
        runner, dataloader: as in mmengine's ``EpochBasedTrainLoop``.
        max_epochs: the epochs to train.
        max_iters: the iterations to train, in place of ``max_epochs``.
        val_interval: epochs or iterations between two validations; None: one epoch, or a tenth of
            ``max_iters``.
        options: ``val_begin`` and ``dynamic_intervals``, as in mmengine's loops.

    Raises:
        ValueError: both or none of ``max_epochs`` and ``max_iters``, or no batch in an epoch.

    Attributes:
        by_iterations: whether training and validation are counted in iterations.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        val_interval: int | None = None,
        **options: Any,
    ) -> None:
        if (max_epochs is None) == (max_iters is None):
            raise ValueError(
                f'ResumableTrainLoop: max_epochs={max_epochs!r} and max_iters={max_iters!r}, expected one of the two'
            )
        self.by_iterations = max_iters is not None
        if val_interval is None:
            val_interval = max(1, max_iters // 10) if self.by_iterations else 1
        epochs = 1 if max_epochs is None else max_epochs
        super().__init__(runner, dataloader, epochs, val_interval=val_interval, **options)
        if self.by_iterations:
            if not len(self.dataloader):
                raise ValueError(
                    f'max_iters={max_iters}: the training data give no batch, expected at least one '
                    '(with drop_last=True, as many images as a batch has)'
                )
            self._max_iters = max_iters
            self._max_epochs = math.ceil(max_iters / len(self.dataloader))
        self._stop_asked = False
        self.dataloader.worker_init_fn = partial(start_worker, self.dataloader.worker_init_fn)

    def run(self) -> nn.Module:
        """Trains to the last epoch or iteration, from wherever the counters stand."""
        metainfo = getattr(self.dataloader.dataset, 'metainfo', {})
        # Only now: resuming may have brought another seed.
        self._key = (self.runner.seed, metainfo.get('stage', 0))
        if not self.by_iterations:
            return super().run()
        self.runner.call_hook('before_train')
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
        self.runner.call_hook('after_train')
        return self.runner.model

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
        start = self._epoch * len(self.dataloader)
        done = self._iter - start
        # The last pass over the data may end before all of it was seen.
        count = min(len(self.dataloader), self._max_iters - start)
        self._check_position(done, count)
        # Samplers that draw from torch's own generator give the epoch's order again, too.
        seed_all(*self._key, 0, self._epoch)
        for index, batch in enumerate(self._batches(done, count), start=done):
            self.run_iter(self._iter if self.by_iterations else index, batch)
            if self.by_iterations:
                self._validate()
                if self.stop_training:
                    break
        seed_all(*self._key, 1, self._epoch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _validate(self) -> None:
        """Validates within an epoch, where it is time to."""
        self._decide_current_val_interval()
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        if self.runner.val_loop is None or self._iter < self.val_begin or not due:
            return
        with self._ended_by_sigterm():
            self.runner.val_loop.run()
        self.runner.model.train()

    def _decide_current_val_interval(self) -> None:
        done = self._iter if self.by_iterations else self._epoch
        step = bisect.bisect(self.dynamic_milestones, done + 1)
        self.val_interval = self.dynamic_intervals[step - 1]

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """One iteration; then the end of the run if SIGTERM came."""
        # Dropout differs from process to process, as from image to image; the first draws as one alone would.
        seed_all(*self._key, 2, self._iter, *filter(None, [get_rank()]))
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

    def _batches(self, done: int, count: int) -> Iterator[Any]:
        """The first ``count`` batches of the epoch behind the first ``done``, which are not loaded."""
        loader = self.dataloader
        if done == 0 and count == len(loader):
            # A sampler may have more to give than its length says.
            return itertools.islice(started(loader), count)
        left = list(itertools.islice(loader.batch_sampler, done, count))
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
        return started(rest)

    def _check_position(self, done: int, count: int) -> None:
        if not 0 <= done <= count:
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
        self._before = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def _ended_by_sigterm(self) -> Iterator[None]:
        """A context within :meth:`_watching_for_sigterm` in which the signal ends the process as it does elsewhere."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        watching = signal.signal(signal.SIGTERM, self._before)
        try:
            # It may have come since the iteration ended.
            self._stop_if_asked()
            yield
        finally:
            signal.signal(signal.SIGTERM, watching)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True


def set_epoch(dataset: Dataset, epoch: int) -> None:
    """Calls ``set_epoch`` of a data set, or of those that it joins, where there is such a method."""
    for part in getattr(dataset, 'datasets', None) or [dataset]:
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
