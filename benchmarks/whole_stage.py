# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Where the seconds of a later stage go: its steps, and everything around them."""

import logging
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from prettytable import PrettyTable, TableStyle
from torch.utils.data.dataloader import _BaseDataLoaderIter

from benchmarks.bundle import SHARED
from benchmarks.measure import Ratio
from benchmarks.stopwatch import MEASURING, Stopwatch, watch_all
from mmseg_sats.engine.training.stage_work import StageWork

CONFIGS = Path(__file__).resolve().parents[1] / 'configs/sats'
# Stage 0 is only begun; the later ones are trained as the recipe says.
SETTINGS = dict(
    epochs=1,
    report=None,
    rehearsal=None,
    train_dataloader=dict(num_batch_per_epoch=2),
    later_stages=dict(train_dataloader=dict(num_batch_per_epoch=None)),
)
SHOWN = {
    'training': 'steps',
    'waiting for data': 'waiting for data',
    'evaluation': 'evaluation',
    'thresholds': 'thresholds of the pseudo-labels',
    'checkpoint after the last iteration': 'checkpoints',
}
BORDER = 'border: building and letting go of the stage'


def measure() -> list[Ratio]:
    """Runs two later stages, prints their parts, and returns each part over the steps."""
    watch, starts = Stopwatch(), []
    watch_all(watch)
    _watch_waiting(watch)
    _watch_stages(watch, starts)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['MMSEG_SATS_CACHE'] = f'{folder}/cache'
        RUNNERS.build(_config(Path(folder))).train()
    stages = [_sum(watch.sheets[start:stop]) for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    later = stages[1:]
    print(_table(later))
    total = sum(later, Counter())
    steps = total.pop('steps')
    detail = f'of {len(later)} stages'
    return [Ratio(f'{name} over the steps', seconds / steps, detail=f'{seconds:.1f} over {steps:.1f} s {detail}')
            for name, seconds in total.items()]  # fmt: skip


def _config(folder: Path) -> Config:
    """SATS on voc_mini, 18-1, or, without these images, on the shapes."""
    data = Path(os.environ.get('VOC_MINI', SHARED / 'data/voc_mini'))
    weights = Path(os.environ.get('MIT_B0', SHARED / 'weights/mit_b0.pth'))
    values: dict[str, Any] = SETTINGS | dict(work_dir=f'{folder}/run')
    if data.exists() and weights.exists():
        name = 'segformer_b0_voc_mini_15-1.py'
        values |= dict(protocol='18-1', data_root=str(data), pretrained=str(weights))
        values['later_stages'] = values['later_stages'] | dict(epochs=6)
    else:
        print(f'{data} or {weights} does not exist ($VOC_MINI, $MIT_B0): measured on the shapes')
        name = 'segformer_tiny_shapes_3-1.py'
        values |= dict(data_root=f'{folder}/data')
        values['later_stages'] = values['later_stages'] | dict(epochs=20)
    cfg = Config.fromfile(CONFIGS / name)
    cfg.merge_from_dict(values)
    return cfg


def _watch_waiting(watch: Stopwatch) -> None:
    """Times how long the training loop waits for a batch; what evaluation waits is evaluation."""
    fetch = _BaseDataLoaderIter.__next__

    def waiting(self: _BaseDataLoaderIter) -> Any:
        if watch.current != 'other':
            return fetch(self)
        with watch.part('waiting for data'):
            return fetch(self)

    _BaseDataLoaderIter.__next__ = waiting


def _watch_stages(watch: Stopwatch, starts: list[int]) -> None:
    """Begins a sheet with each stage and notes its number."""
    run = StageWork.run

    def begin(self: StageWork, *args: Any) -> None:
        watch.new_sheet()
        starts.append(len(watch.sheets) - 1)
        run(self, *args)

    StageWork.run = begin


def _sum(sheets: list[dict[str, list[float]]]) -> Counter[str]:
    """Seconds that passed, by what is shown."""
    total: Counter[str] = Counter(dict.fromkeys((*SHOWN.values(), BORDER), 0.0))
    for sheet in sheets:
        for name, (seconds, _) in sheet.items():
            if name == MEASURING:
                continue
            total[SHOWN.get(name, BORDER)] += seconds
    return total


def _table(stages: list[Counter[str]]) -> PrettyTable:
    table = PrettyTable(['part', *(f'stage {index}, s' for index in range(1, len(stages) + 1)), 'share'])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'r'
    table.align['part'] = 'l'
    everything = sum(sum(stage.values()) for stage in stages)
    for name in stages[0]:
        own = [stage[name] for stage in stages]
        table.add_row([name, *(f'{seconds:.1f}' for seconds in own), f'{100 * sum(own) / everything:.0f} %'])
    return table
