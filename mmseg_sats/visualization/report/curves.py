# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Line and bar pictures of several runs: mIoU by stage, old against new, sweeps, time and memory."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from mmseg_sats.visualization.report.run_record import RunRecord, StageRecord, Sweep
from mmseg_sats.visualization.theme import INK, SERIES, bar_style, new_figure, series_style

GROUPS = {'all': 'all classes', 'base': 'base classes', 'new': 'classes learned later'}


def draw_curves(runs: Sequence[RunRecord]) -> Figure:
    """mIoU after each stage against the number of classes learned so far, a plot per group.

    A run of a single stage is one point at its number of classes, with a line across as the level
    to compare with.
    """
    figure, axes = new_figure(6.6 + _legend_height(runs), rows=3, sharex=True, height_ratios=[2, 1, 1])
    for ax, (key, title) in zip(axes, GROUPS.items(), strict=True):
        for i, run in enumerate(runs):
            _curve(ax, run, key, series_style(i))
        ax.set_ylabel('mIoU in %')
        ax.set_title(title, loc='left')
        ax.set_ylim(bottom=0)
        ax.set_ylim(top=1.05 * ax.get_ylim()[1])  # curves near the top keep their markers whole
        ax.grid(True)
    axes[-1].set_xlabel('foreground classes learned')
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes[0])
    return figure


def _curve(ax: Axes, run: RunRecord, key: str, style: dict[str, object]) -> None:
    points = [
        (len(stage.results['iou']) - 1, stage.results['mIoU'][key])
        for stage in run.stages
        if stage.results['mIoU'][key] is not None
    ]
    if points:
        ax.plot(*zip(*points, strict=True), label=run.label, **style)
    if len(run.stages) == 1 and points:
        ax.axhline(points[0][1], color=style['color'], linewidth=0.9, linestyle=(0, (1, 2)))


def _columns(labels: Sequence[str]) -> int:
    """How many labels stand side by side in a legend."""
    widest = max((len(label) for label in labels), default=1)
    return max(1, min(4, 48 // (widest + 6)))


def _legend_height(runs: Sequence[RunRecord]) -> float:
    """Inches of a legend of the runs, beyond the two rows that every figure has room for."""
    labels = [run.label for run in runs]
    return 0.17 * max(0, -(-len(labels) // _columns(labels)) - 2)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper left', ncols=_columns(labels), handlelength=3)


def draw_old_new(runs: Sequence[RunRecord]) -> Figure:
    """Base, later and all classes after the last stage, bars with their values."""
    figure, axes = new_figure(0.9 + 0.62 * len(runs))
    ax = axes[0]
    height = 0.26
    for j, (key, title) in enumerate(GROUPS.items()):
        places = [i + (j - 1) * height for i in range(len(runs))]
        values = [run.results['final'][key] for run in runs]
        bars = ax.barh(
            places, [value or 0 for value in values], height * 0.92, color=SERIES[j], label=title
        )
        texts = ['none' if value is None else f'{value:.1f}' for value in values]
        ax.bar_label(bars, texts, padding=2, color=INK, fontsize=7.5)
    ax.set_yticks(range(len(runs)), [run.label for run in runs])
    ax.invert_yaxis()
    ax.set_xlabel('mIoU in % after the last stage')
    ax.margins(x=0.12)
    _legend(figure, ax)
    return figure


def draw_sweep(sweep: Sweep) -> Figure:
    """Final mIoU against the one value in which runs differ: means over seeds, runs as points."""
    figure, axes = new_figure(2.9)
    ax = axes[0]
    values = sorted({value for value, _ in sweep.points})
    for i, (key, title) in enumerate(GROUPS.items()):
        style = series_style(i)
        points = [
            (value, run.results['final'][key])
            for value, run in sweep.points
            if run.results['final'][key] is not None
        ]
        if not points:  # joint training, say, has nothing new
            continue
        ax.plot(*zip(*points, strict=True), style['marker'], color=style['color'], markersize=3)
        means = [
            _mean([y for x, y in points if x == value]) for value in values
        ]
        ax.plot(values, means, label=title, **style)
    if min(values) > 0 and max(values) >= 10 * min(values):
        ax.set_xscale('log')
        ax.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 6:
        ax.set_xticks(values, [f'{value:g}' for value in values])
    ax.set_xlabel(sweep.key)
    ax.set_ylabel('mIoU in %')
    ax.grid(True)
    _legend(figure, ax)
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float('nan')


def draw_costs(runs: Sequence[RunRecord]) -> Figure:
    """Minutes of training by stage, and accelerator memory where it was logged."""
    measures: list[tuple[str, Callable[[StageRecord], float | None]]] = [
        ('training in minutes', lambda stage: None if stage.seconds is None else stage.seconds / 60)
    ]
    if any(stage.memory is not None for run in runs for stage in run.stages):
        measures.append(('memory in MiB', lambda stage: stage.memory))
    height = 0.7 + 1.9 * len(measures) + _legend_height(runs)
    figure, axes = new_figure(height, rows=len(measures), sharex=True)
    width = 0.8 / len(runs)
    for ax, (title, measure) in zip(axes, measures, strict=True):
        for i, run in enumerate(runs):
            places = [stage.index + (i - (len(runs) - 1) / 2) * width for stage in run.stages]
            heights = [measure(stage) or 0 for stage in run.stages]
            ax.bar(places, heights, width * 0.92, label=run.label, **bar_style(i))
        ax.set_ylabel(title)
    axes[-1].set_xlabel('stage')
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes[0])
    return figure
