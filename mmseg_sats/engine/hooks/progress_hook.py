# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Shows the progress of a run: a display in a terminal, plain lines in a file."""

import atexit
import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich import get_console
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.engine.run_plan import (
    StagePlan,
    find_incremental_dataset,
    plan_run,
    time_left,
)
from mmseg_sats.protocol import Stage
from mmseg_sats.utils.shared_values import once

_REFRESH = 0.5  # seconds between two updates of the display
_SHOWN_STAGES = 10  # rows of the table, so that the display fits into 24 lines


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows the current stage, the classes that it learns, its losses by part, and the time left.

    In a terminal this is a display below all other output; meanwhile mmengine's messages go only to the
    log file, except warnings. The log file, and an output that is not a terminal, get a plain line with
    the same information every ``interval`` seconds. Times are those of training, without evaluation.

    Args:
        interval: seconds between plain lines.
        terminal: whether to draw the display. None draws it if the output is a terminal, or if rich's
            console was set to one (``rich.reconfigure(file=...)``).
    """

    priority = 'LOW'  # runs after the losses of an iteration are logged

    def __init__(self, interval: float = 60.0, terminal: bool | None = None) -> None:
        self.interval = interval
        self.console = get_console() if terminal is None else Console(force_terminal=terminal)
        self.plans: list[StagePlan] = []
        self._live: Live | None = None
        self._quiet: list[tuple[logging.StreamHandler, int, Any]] = []

    def before_train(self, runner: Runner) -> None:
        """Collects the plan of the run, and starts the display or logs the first line."""
        dataset = find_incremental_dataset(runner.train_dataloader.dataset)
        self.index = 0 if dataset is None else dataset.stage.index
        self.plans = [] if dataset is None else _plans(runner, dataset)
        self.images = len(runner.train_dataloader.dataset)
        self.learns = (
            [] if dataset is None else [dataset.class_names[c] for c in dataset.stage.new]
        )
        self.rows = _stages_so_far(Path(runner.work_dir))
        self._started = self._warm = self._drawn = self._told = time.perf_counter()
        self._first = runner.iter
        if not is_main_process():
            return
        runner.logger.info(f'{self._where()}: {self._what()}')
        if self.console.is_terminal:
            self._open(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Updates the display, and logs the losses and the time left every ``interval`` seconds."""
        if not is_main_process():
            return
        now = time.perf_counter()
        if runner.iter == self._first:
            self._warm = now
        last = runner.iter + 1 >= runner.max_iters
        if self._live is not None and (last or now - self._drawn >= _REFRESH):
            self._drawn = now
            self._live.update(self._display(runner), refresh=True)
        if last or now - self._told >= self.interval:
            self._told = now
            losses = ', '.join(f'{name} {value:.4g}' for name, value in _losses(runner).items())
            stage, run = self._left(runner)
            runner.logger.info(
                f'{self._where()}, {_epoch(runner)}: {losses}; training left: {stage} for the '
                f'stage, about {run} for the run'
            )

    def after_train(self, runner: Runner) -> None:
        """Removes the display."""
        self._close()

    def after_stage(self, runner: Runner, stage: Stage, metrics: Mapping[str, float]) -> None:
        """Logs the mIoU of the stage."""
        if is_main_process():
            values = {key: metrics[f'mIoU_{key}'] for key in ('base', 'new', 'all')}
            told = ', '.join(f'{k} {v:.2f}' for k, v in values.items() if not math.isnan(v))
            self.index = stage.index
            runner.logger.info(f'{self._where()} is done: mIoU {told or "unknown"}')

    def _where(self) -> str:
        of = f' (of 0 to {len(self.plans) - 1})' if len(self.plans) > 1 else ''
        return f'stage {self.index}{of}'

    def _what(self) -> str:
        names = ', '.join(self.learns)
        if len(names) > 48:
            names = f'{len(self.learns)} classes'
        return f'{self.images} images' + (f', learns {names}' if names else '')

    def _left(self, runner: Runner) -> tuple[str, str]:
        done = runner.iter + 1
        # The first iteration also starts the workers, so it counts only as long as it is the only one.
        counted = done - self._first - 1
        start = self._warm if counted else self._started
        pace = (time.perf_counter() - start) / max(1, counted)
        seconds = time_left(self.plans, self.index, done, runner.max_iters, pace)
        stage, run = (str(datetime.timedelta(seconds=round(value))) for value in seconds)
        return stage, run

    def _display(self, runner: Runner) -> RenderableType:
        """The display, at most 20 lines of at most 80 columns."""
        left = ''
        if runner.iter > self._first:
            left = '   left: {} for the stage, about {} for the run'.format(*self._left(runner))
        losses = '  '.join(f'{name} {value:.4g}' for name, value in _losses(runner).items())
        lines: list[RenderableType] = [
            Text(f'{self._where()}: {self._what()}', style='bold', overflow='ellipsis', no_wrap=True),
            _bar(runner.iter + 1, runner.max_iters),
            Text(_epoch(runner) + left),
            Text(f'loss: {losses}', overflow='ellipsis', no_wrap=True),
        ]
        if self.rows:
            lines.append(_table(self.rows[-_SHOWN_STAGES:]))
        return Group(*lines)

    def _open(self, runner: Runner) -> None:
        shares_screen = self.console.file is sys.stdout
        self._live = Live(
            self._display(runner),
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=shares_screen,
            redirect_stderr=shares_screen,
        )
        self._live.start(refresh=True)
        # If an error ends training, after_train is not called, but the cursor must be restored.
        atexit.register(self._close)
        if not shares_screen:
            return
        for handler in runner.logger.handlers:
            if type(handler) is logging.StreamHandler:  # not isinstance, since a FileHandler is a subclass
                self._quiet.append((handler, handler.level, handler.stream))
                handler.setLevel(max(handler.level, logging.WARNING))
                # Output must now pass through the display, which moves down to make space for it.
                handler.setStream(sys.stdout)

    def _close(self) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        for handler, level, stream in self._quiet:
            handler.setLevel(level)
            handler.setStream(stream)
        self._quiet.clear()
        atexit.unregister(self._close)


def _plans(runner: Runner, dataset: IncrementalDataset) -> list[StagePlan]:
    """The plans of the run's stages; empty if the stage is run on its own, and on all ranks but the first."""
    dataset.full_init()  # on every rank, because ranks are synchronised when masks are read
    work_dir = Path(runner.work_dir).resolve().parent
    path = work_dir / 'config.py'
    if not (is_main_process() and path.is_file()):
        return []

    def plan() -> list[StagePlan]:
        cfg = Config.fromfile(path, import_custom_modules=False)  # this process has them
        if cfg.get('runner_type') != 'IncrementalRunner' or cfg.protocol != dataset.protocol.name:
            return []
        return plan_run(cfg, dataset, work_dir)

    return once(('plan', path, dataset.setting), plan)


def _losses(runner: Runner) -> dict[str, float]:
    """The parts of the loss and, last, their sum; each is the mean of the last 10 iterations."""
    scalars = runner.message_hub.log_scalars
    names = [name for name in scalars if name.startswith('train/') and 'loss' in name]
    names.sort(key=lambda name: name == 'train/loss')
    return {
        name.removeprefix('train/').removeprefix('decode.').replace('loss_', ''): float(
            scalars[name].mean(10)
        )
        for name in names
    }


def _epoch(runner: Runner) -> str:
    if runner.cfg.train_cfg.get('max_iters'):
        return f'iteration {runner.iter + 1} of {runner.max_iters}'
    return f'epoch {min(runner.epoch + 1, runner.max_epochs)} of {runner.max_epochs}'


def _bar(done: int, total: int) -> Table:
    """A progress bar on its own line. A bare ``ProgressBar`` would not end its line."""
    line = Table.grid()
    line.add_row(ProgressBar(total=total, completed=done, width=60))
    return line


def _stages_so_far(folder: Path) -> list[Sequence[str]]:
    """One row for each of the last finished stages: stage, classes learned, mIoU of base, new and all."""
    name = folder.resolve().name.removeprefix('stage_')
    number = int(name) if name.isdigit() else 0
    rows = []
    for index in range(max(0, number - _SHOWN_STAGES), number):
        path = folder.resolve().parent / f'stage_{index}' / 'metrics.json'
        if path.is_file():
            results = json.loads(path.read_text(encoding='utf-8'))['results']
            values = [results['mIoU'][key] for key in ('base', 'new', 'all')]
            names = ', '.join(results['new_classes'])
            names = names if len(names) <= 32 else f'{len(results["new_classes"])} classes'
            rows.append(
                [str(index), names, *('-' if value is None else f'{value:.2f}' for value in values)]
            )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style='dim')
    for name in ('stage', 'learned'):
        table.add_column(name, no_wrap=True)
    for name in ('base', 'new', 'all'):
        table.add_column(name, justify='right')
    for row in rows:
        table.add_row(*row)
    return table
