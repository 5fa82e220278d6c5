# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What lies between two stages of a run of fifty: its time, its parts, and what memory it leaves."""

import functools
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import TestLoop
from prettytable import PrettyTable, TableStyle

import mmseg_sats.engine.training.stage_work as stage_work
from benchmarks.measure import Ratio, finish_device, resident_bytes
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

STAGES = 50
SETTINGS = dict(
    protocol='1-1',
    num_shapes=STAGES,
    memory=STAGES,
    epochs=1,
    image_size=64,
    crop_size=64,
    train_images=500,
    val_images=25,
    eval_images='all',
    batch_size=4,
    report=None,
    # One iteration a stage.
    train_dataloader=dict(num_batch_per_epoch=1),
)
WINDOWS = {'stage 5': range(3, 10), 'stage 25': range(22, 29), 'stage 50': range(43, 50)}
LONGEST, GROWTH, MEMORY = 2.0, 1.1, 1.1

# What belongs to the stages and not to the border between them.
TAKEN_OUT = 'training', 'evaluation', 'thresholds'
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
    """Time by part, that of a part within a part counted once; a new sheet for every border.

    Attributes:
        sheets: by border, part to [seconds that passed, seconds of the processor].
        resident: bytes held in each stage's training.
    """

    def __init__(self) -> None:
        self.sheets: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0])]
        self.resident: list[int] = []
        self._parts = ['other']
        self._since = self._now()

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
            with self.part(name):
                if name == 'training':
                    self._note()
                    self.sheets.append(defaultdict(lambda: [0.0, 0.0]))
                    self.resident.append(resident_bytes())
                return function(*args, **options)

        return wrapper

    def border(self, index: int, clock: int) -> float:
        """Seconds from stage ``index - 1``'s iteration to stage ``index``'s; clock 0 or 1."""
        parts = self.sheets[index].items()
        return sum(seconds[clock] for name, seconds in parts if name not in TAKEN_OUT)


def measure() -> list[Ratio]:
    """Runs the stages, prints a border's parts, and returns border and memory."""
    watch = Stopwatch()
    _watch_all(watch)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['MMSEG_SATS_CACHE'] = f'{folder}/cache'
        _draw(Path(folder))
        cfg = _config(Path(folder))
        start = time.perf_counter()
        runner = RUNNERS.build(cfg)
        checks = time.perf_counter() - start
        runner.train()
    print(f'checks before the first stage: {checks:.1f} s for {STAGES} stages')
    print(_table(watch))
    return _ratios(watch, checks)


def _watch_all(watch: Stopwatch) -> None:
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


def _config(folder: Path) -> Config:
    cfg = Config.fromfile(Path(__file__).parents[1] / 'configs/sats/segformer_tiny_shapes_3-1_m.py')
    cfg.merge_from_dict(SETTINGS | dict(data_root=f'{folder}/data', work_dir=f'{folder}/run'))
    return cfg


def _draw(folder: Path) -> None:
    """Draws the images, and has libraries imported, by a run of its first two stages' like."""
    cfg = _config(folder)
    cfg.merge_from_dict(dict(work_dir=f'{folder}/first', protocol='49-1'))
    RUNNERS.build(cfg)


def _medians(watch: Stopwatch, window: Sequence[int], clock: int) -> float:
    return statistics.median(watch.border(index, clock) for index in window)


def _table(watch: Stopwatch) -> PrettyTable:
    """Medians of a part's seconds over the seven borders around each stage."""
    table = PrettyTable(['part', *WINDOWS])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'r'
    table.align['part'] = 'l'

    def row(name: str, seconds: Callable[[int], float]) -> None:
        middles = [statistics.median(map(seconds, window)) for window in WINDOWS.values()]
        table.add_row([name, *(f'{middle:.3f}' for middle in middles)])

    for name in [*PARTS, 'other']:
        if name not in TAKEN_OUT:
            row(name, lambda index, name=name: watch.sheets[index][name][0])
    row('**border**', lambda index: watch.border(index, 0))
    row('of it the processor\'s', lambda index: watch.border(index, 1))
    for name in TAKEN_OUT:
        row(f'(taken out: {name})', lambda index, name=name: watch.sheets[index][name][0])
    return table


def _ratios(watch: Stopwatch, checks: float) -> list[Ratio]:
    early, _, late = WINDOWS.values()
    passed = _medians(watch, late, 0)  # on a busy machine mostly the others' time
    first, last = (_medians(watch, window, 1) for window in (early, late))
    before, after = watch.resident[5], watch.resident[-1]
    mib = 2**20
    return [
        Ratio('border over 2 s', passed / LONGEST, 1.0, detail=f'{passed:.2f} s at stage {STAGES}'),
        Ratio('border, the processor\'s time over 2 s', last / LONGEST, 1.0,
              detail=f'{last:.2f} s at stage {STAGES}'),
        Ratio('border at stage 50 over stage 5', last / first, GROWTH,
              detail=f'{last:.2f} s of the processor over {first:.2f} s'),
        Ratio('memory at stage 50 over stage 5', after / before, MEMORY,
              detail=f'{after / mib:.0f} MiB over {before / mib:.0f} MiB'),
        Ratio('checks over 10 s', checks / 10, 1.0, detail=f'{checks:.1f} s for {STAGES} stages'),
    ]  # fmt: skip
