# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Where the time of a run goes: a stopwatch on the parts of its stages."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.runner import TestLoop

import mmseg_sats.engine.training.stage_work as stage_work
from benchmarks.measure import finish_device, resident_bytes
from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.engine import (
    AtomicCheckpointHook,
    IncrementalRunner,
    ProgressHook,
    PseudoLabelThresholdHook,
    StageRunner,
)
from mmseg_sats.engine.config.config_text import StageConfig
from mmseg_sats.engine.training.stage_work import StageWork
from mmseg_sats.models import IncrementalEncoderDecoder
from mmseg_sats.models.segmentors.old_model import OldModel

MEASURING = 'measuring memory'  # of which a run has nothing
PARTS: dict[str, list[tuple[Any, str]]] = {
    'training': [(IncrementalEncoderDecoder, 'train_step')],
    'evaluation': [(TestLoop, 'run')],
    'thresholds': [(PseudoLabelThresholdHook, 'find')],
    'checkpoint after the last iteration': [(AtomicCheckpointHook, '_write')],
    'snapshot written': [(stage_work, 'trained_weights'), (stage_work, 'write_weights')],
    'snapshot read': [
        (stage_work, 'load_snapshot'),
        (StageRunner, 'load_checkpoint'),
        (OldModel, 'from_checkpoint'),
    ],
    'data sets': [(IncrementalDataset, '__init__'), (IncrementalDataset, 'full_init')],
    'stage\'s config': [(StageWork, 'config')],
    'config as text': [(StageConfig, 'pretty_text')],
    'environment': [(StageRunner, '_log_env')],
    'visualizer': [(StageRunner, 'build_visualizer')],
    'model': [(StageRunner, 'build_model')],
    'optimizer': [(StageRunner, 'build_optim_wrapper')],
    'loaders': [(StageRunner, 'build_dataloader')],
    'progress': [(ProgressHook, 'before_train')],
    'exemplars': [(stage_work, 'keep_exemplars')],
    'results so far': [(IncrementalRunner, '_report')],
    'letting go of the stage': [(stage_work, '_release')],
}


class Stopwatch:
    """Time by part, that of a part within a part counted once; a new sheet for every iteration and what follows it.

    Attributes:
        sheets: by iteration, part to [seconds that passed, seconds of the processor].
        resident: bytes held in each stage's training.
    """

    def __init__(self) -> None:
        self.sheets: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0])]
        self.resident: list[int] = []
        self._parts = ['other']
        self._since = self._now()

    @property
    def current(self) -> str:
        """The part that time goes to now; ``'other'`` outside of all parts."""
        return self._parts[-1]

    def new_sheet(self) -> None:
        """Begins a new sheet."""
        self._note()
        self.sheets.append(defaultdict(lambda: [0.0, 0.0]))

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    def _note(self) -> None:
        now = self._now()
        entry = self.sheets[-1][self._parts[-1]]
        for i, (before, after) in enumerate(zip(self._since, now, strict=True)):
            entry[i] += after - before
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, time goes to ``name``."""
        self._note()
        self._parts.append(name)
        try:
            yield
        finally:
            finish_device()  # what a part gives a GPU to do is its own
            self._note()
            self._parts.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """``function``, its time noted under ``name``; training begins a new sheet."""

        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            if name == 'training':
                self.new_sheet()
                with self.part(MEASURING):
                    self.resident.append(resident_bytes())
            with self.part(name):
                return function(*args, **options)

        return wrapper


def watch_all(watch: Stopwatch) -> None:
    """Has the parts of every run in this process timed from now on."""
    for name, places in PARTS.items():
        for owner, attribute in places:
            found = vars(owner)[attribute] if attribute in vars(owner) else getattr(owner, attribute)
            if isinstance(found, property):
                found = property(watch.timed(name, found.fget))
            elif isinstance(found, classmethod | staticmethod):
                found = type(found)(watch.timed(name, found.__func__))
            elif attribute == 'build_dataloader':
                found = staticmethod(watch.timed(name, found))
            else:
                found = watch.timed(name, found)
            setattr(owner, attribute, found)
