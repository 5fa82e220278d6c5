# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What lies between two stages of a run of fifty: its time, its parts, and what memory it leaves."""

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS
from prettytable import PrettyTable, TableStyle

from benchmarks.measure import Ratio
from benchmarks.stopwatch import MEASURING, PARTS, Stopwatch, watch_all

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
TAKEN_OUT = 'training', 'evaluation', 'thresholds', MEASURING


def measure() -> list[Ratio]:
    """Runs the stages, prints a border's parts, and returns border and memory."""
    watch, checks = run_stages()
    print(f'checks before the first stage: {checks:.1f} s for {STAGES} stages')
    print(_table(watch))
    return _ratios(watch, checks)


def run_stages() -> tuple[Stopwatch, float]:
    """Runs all stages; returns their stopwatch and the seconds that the checks before them took."""
    watch = Stopwatch()
    watch_all(watch)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['MMSEG_SATS_CACHE'] = f'{folder}/cache'
        _draw(Path(folder))
        cfg = _config(Path(folder))
        start = time.perf_counter()
        runner = RUNNERS.build(cfg)
        checks = time.perf_counter() - start
        runner.train()
    return watch, checks


def _config(folder: Path) -> Config:
    cfg = Config.fromfile(Path(__file__).parents[1] / 'configs/sats/segformer_tiny_shapes_3-1_m.py')
    cfg.merge_from_dict(SETTINGS | dict(data_root=f'{folder}/data', work_dir=f'{folder}/run'))
    return cfg


def _draw(folder: Path) -> None:
    """Draws the images, and has libraries imported, by a run of its first two stages' like."""
    cfg = _config(folder)
    cfg.merge_from_dict(dict(work_dir=f'{folder}/first', protocol='49-1'))
    RUNNERS.build(cfg)


def _border(watch: Stopwatch, index: int, clock: int) -> float:
    """Seconds from stage ``index - 1``'s iteration to stage ``index``'s; clock 0 or 1."""
    parts = watch.sheets[index].items()
    return sum(seconds[clock] for name, seconds in parts if name not in TAKEN_OUT)


def medians(watch: Stopwatch, window: Sequence[int], clock: int) -> float:
    """The median of the borders' seconds; clock 0 for those that passed, 1 for those of the processor."""
    return statistics.median(_border(watch, index, clock) for index in window)


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
    row('**border**', lambda index: _border(watch, index, 0))
    row('of it the processor\'s', lambda index: _border(watch, index, 1))
    for name in TAKEN_OUT:
        row(f'(taken out: {name})', lambda index, name=name: watch.sheets[index][name][0])
    return table


def _ratios(watch: Stopwatch, checks: float) -> list[Ratio]:
    early, _, late = WINDOWS.values()
    passed = medians(watch, late, 0)  # on a busy machine mostly the others' time
    first, last = (medians(watch, window, 1) for window in (early, late))
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
