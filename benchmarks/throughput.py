# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Images a second of fine-tuning and SATS on a GPU, for three encoders, and what VOC 15-1 comes to."""

import csv
import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import mmseg_sats
from benchmarks.measure import PRECISIONS, Ratio, device, finish_device, median_seconds
from benchmarks.models import SIZES, Stage, stage
from benchmarks.step import NUM_NEW, NUM_OLD
from mmseg_sats.models.segmentors.cuda_graph import IN_A_ROW

CROP, BATCH, EPOCHS = 512, 24, 30
"""The paper's."""
GOAL = 1.10


COLUMNS = (
    'encoder', 'precision', 'FT, images/s', 'SATS, images/s', f'SATS step over FT + old model (goal {GOAL:.2f})',
    'the same with the old model from a graph', 'peak memory, FT and SATS', 'VOC 15-1',
)  # fmt: skip


def measure(precisions: Sequence[str] = tuple(PRECISIONS)) -> list[Ratio]:
    """A SATS step, without and with a CUDA graph, over fine-tuning's and the old model's pass, for each encoder and
    precision.

    Prints the table that docs/performance.md has, each row as it is measured: the next may be stopped.
    """
    if device().type == 'cpu':
        print('no GPU: nothing is measured; a step of 24 images would take minutes on a CPU')
        return []
    _print_row(COLUMNS)
    _print_row(['---'] * len(COLUMNS))
    ratios = []
    for precision in precisions:
        for size in SIZES:
            try:
                row, measured = _row(size, precision)
            except torch.cuda.OutOfMemoryError:
                _print_row([size, precision, 'not measured: out of memory'])
                continue
            _print_row([size, precision, *row])
            ratios += measured
    print(flush=True)
    return ratios


def _print_row(cells: Iterable[str]) -> None:
    print(f'| {" | ".join(cells)} |', flush=True)


def _row(size: str, precision: str) -> tuple[list[str], list[Ratio]]:
    options = dict(dtype=PRECISIONS[precision], crop_size=CROP, batch_size=BATCH, size=size)
    tuned, tuned_peak = _with_peak('finetune', options)
    sats, sats_peak = _with_peak('sats', options)
    seconds = median_seconds(
        {
            'FT': tuned.step,
            'SATS': lambda: _step(sats, graphed=False),
            'graph': lambda: _step(sats, graphed=True),
            'old model': sats.old_forward,
        },
        warmup=IN_A_ROW + 1,
    )
    floor = seconds['FT'] + seconds['old model']
    of_what = f'over {1000 * seconds["FT"]:.0f} + {1000 * seconds["old model"]:.0f} ms'
    names = {'SATS': ''} | ({'graph': ' with a graph'} if sats.model.old_model.graphed_pass.captured else {})
    ratios = [
        Ratio(
            f'{size}, {precision}: SATS step{with_graph} over the floor',
            seconds[name] / floor,
            GOAL,
            detail=f'{1000 * seconds[name]:.0f} {of_what}',
        )
        for name, with_graph in names.items()
    ]
    cells = [f'{ratio.value:.2f}{"" if ratio.met else ", **missed**"} ({ratio.detail})' for ratio in ratios]
    row = [
        f'{BATCH / seconds["FT"]:.0f}',
        f'{BATCH / seconds["SATS"]:.0f}',
        *(cells if len(cells) == 2 else [*cells, 'not captured']),
        f'{tuned_peak / 2**30:.1f} and {sats_peak / 2**30:.1f} GiB',
        f'{_hours(seconds["FT"], seconds["SATS"]):.1f} h',
    ]
    return row, ratios


def _step(sats: Stage, *, graphed: bool) -> None:
    sats.model.old_model.graphed = graphed
    sats.step()


def _with_peak(method: str, options: dict[str, Any]) -> tuple[Stage, int]:
    """A method's stage, and what its step's tensors take at most: weights, optimizer, activations."""
    gc.collect()
    others = torch.cuda.memory_allocated()
    made = stage(method, NUM_OLD, NUM_NEW, **options)
    if method == 'finetune':
        others += sum(p.numel() * p.element_size() for p in made.model.old_model.model.parameters())
    made.step()  # makes the momentum
    torch.cuda.reset_peak_memory_stats()
    made.step()
    finish_device()
    return made, torch.cuda.max_memory_allocated() - others


def _hours(finetune_step: float, sats_step: float) -> float:
    """Training alone, the data at hand: stage 0 by plain steps, then SATS."""
    first, *later = _voc_15_1()
    steps = [-(-images // BATCH) * EPOCHS for images in (first, *later)]
    return (steps[0] * finetune_step + sum(steps[1:]) * sats_step) / 3600


def _voc_15_1() -> list[int]:
    """The training images of each stage, as published."""
    path = Path(mmseg_sats.__file__).parent / 'datasets/checks/published_counts.csv'
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    wanted = dict(protocol='15-1', setting='overlapped', split='train')
    for row in rows:
        if row['dataset'].startswith('voc') and all(row[key] == value for key, value in wanted.items()):
            return [int(number) for number in row['images per stage'].split()]
    raise ValueError(f'{path} has no row for {wanted}')
