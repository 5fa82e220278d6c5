# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How time and memory grow with classes, pixels, images and stages: a table, a plot, and the exponent of each."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from prettytable import PrettyTable, TableStyle

from benchmarks.measure import Ratio, median_seconds, peak_bytes
from benchmarks.models import stage
from benchmarks.stages import medians, run_stages
from benchmarks.voc_size import make_pairs, repeat
from mmseg_sats.datasets.class_index.mask_scan import scan_masks

PLOT = Path('work_dirs/growth.png')
CLASSES = (21, 51, 151)
SIDES = (256, 512, 1024)
MASKS = (100, 1000, 10000)
STAGES = {6: range(3, 10), 12: range(9, 16), 25: range(22, 29), 46: range(43, 50)}
NEW = 5


@dataclass(frozen=True)
class Growth:
    """What one quantity costs as another one grows.

    Args:
        what: what is measured.
        of: what grows.
        sizes: its values.
        seconds: for each of them.
        mib: the memory, likewise.
    """

    what: str
    of: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    mib: tuple[float, ...]

    def exponent(self, values: Iterable[float]) -> float:
        """The slope of a line through logarithms: 1 where ``values`` grow in proportion, 0 where they do not grow."""
        return float(np.polyfit(np.log(self.sizes), np.log(tuple(values)), 1)[0])


def measure() -> list[Ratio]:
    """Prints the table of exponents, draws the plot, and returns what ten times as much of everything costs."""
    growths = [of_classes(), of_pixels(), of_images(), of_stages()]
    print(_table(growths))
    _plot(growths)
    print(f'plot: {PLOT}')
    return [
        Ratio(f'{name} of {growth.what} with ten times the {growth.of}', 10 ** growth.exponent(values))
        for growth in growths
        for name, values in (('time', growth.seconds), ('memory', growth.mib))
    ]


def of_classes() -> Growth:
    """A step of SATS with MiT-B0, two images of 512 pixels."""
    return _steps('classes', CLASSES, lambda count: stage('sats', count - NEW, NEW, size='B0').step)


def of_pixels() -> Growth:
    """The same with 21 classes, one image."""
    return _steps(
        'pixels of a side', SIDES,
        lambda side: stage('sats', CLASSES[0] - NEW, NEW, size='B0', batch_size=1, crop_size=side).step,
    )  # fmt: skip


def _steps(of: str, sizes: tuple[int, ...], step: Callable[[int], Callable[[], None]]) -> Growth:
    works = {str(size): step(size) for size in sizes}
    seconds = median_seconds(works)
    return Growth(
        'a step', of, sizes, tuple(seconds.values()), tuple(peak_bytes(work) / 2**20 for work in works.values())
    )


def of_images() -> Growth:
    """The scan of the masks by one process."""
    with tempfile.TemporaryDirectory() as folder:
        masks = make_pairs(Path(folder, 'voc'), MASKS[0])
        files = repeat(masks, Path(folder, 'masks'), MASKS[-1])
        works = {str(number): partial(scan_masks, files[:number], workers=1) for number in MASKS}
        seconds = median_seconds(works, warmup=0)
        mib = tuple(peak_bytes(work, host=True) / 2**20 for work in works.values())
    return Growth('the scan of the masks', 'images', MASKS, tuple(seconds.values()), mib)


def of_stages() -> Growth:
    """The border between two stages of a run of 50, and the memory that is held in the later one."""
    watch, _ = run_stages()
    mib = tuple(watch.resident[window[len(window) // 2]] / 2**20 for window in STAGES.values())
    seconds = tuple(medians(watch, window, 1) for window in STAGES.values())
    return Growth('the border between two stages', 'stages before', tuple(STAGES), seconds, mib)


def _table(growths: Iterable[Growth]) -> PrettyTable:
    table = PrettyTable(['what', 'over', 'sizes', 'seconds', 'exponent', 'memory, MiB', 'exponent of memory'])
    table.set_style(TableStyle.MARKDOWN)
    table.align = 'l'
    for growth in growths:
        table.add_row([
            growth.what, growth.of, ', '.join(map(str, growth.sizes)),
            ', '.join(f'{value:.3g}' for value in growth.seconds), f'{growth.exponent(growth.seconds):.2f}',
            ', '.join(f'{value:.0f}' for value in growth.mib), f'{growth.exponent(growth.mib):.2f}',
        ])  # fmt: skip
    return table


def _plot(growths: Iterable[Growth]) -> None:
    """Times and memory over sizes, each in parts of its first."""
    figure = Figure(figsize=(9, 3.8), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for ax, title in zip(axes, ('time', 'memory'), strict=True):
        for growth in growths:
            values = np.array(growth.seconds if title == 'time' else growth.mib)
            label = f'{growth.what}, {growth.of} ({growth.exponent(values):.2f})'
            ax.loglog(np.array(growth.sizes) / growth.sizes[0], values / values[0], marker='o', label=label)
        ax.set(title=f'{title}, in parts of the first', xlabel='size, in parts of the first')
        ax.grid(alpha=0.3)
        ax.legend(fontsize='small', title='exponent in brackets', title_fontsize='small')
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
