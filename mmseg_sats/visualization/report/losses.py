# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The contribution of each part of the loss and its measured weights, with all stages on one axis."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmseg_sats.visualization.report.run_record import RunRecord, StageRecord, loss_parts
from mmseg_sats.visualization.theme import MUTED, SERIES, new_figure, series_style

WEIGHT = 'weight_'


def loss_names(run: RunRecord) -> list[str]:
    """The parts that any stage of the run logged, those of the first stages first."""
    return list(dict.fromkeys(name for stage in run.stages for name in stage.loss_means))


def short_name(name: str) -> str:
    """``'decode.loss_ce'`` as ``'ce'``: what people call the part."""
    return name.removeprefix('decode.').replace('loss_', '')


def loss_series(
    stages: Sequence[StageRecord], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """All stages' losses one after the other.

    Args:
        stages: the stages in order.
        names: the parts, L of them.

    Returns:
        Iterations (T,) counted over the whole run, weighted values (L, T), and the iteration at which
        each stage ends.
    """
    iterations: list[int] = []
    values: list[list[float]] = []
    ends: list[int] = []
    offset = 0
    for stage in stages:
        for line in stage.scalars:
            iterations.append(offset + line['iter'])
            parts = loss_parts(line)
            values.append([parts.get(name, 0.0) for name in names])
        offset = iterations[-1] if iterations else 0
        ends.append(offset)
    return np.array(iterations), np.array(values).reshape(-1, len(names)).T, ends


def draw_losses(run: RunRecord) -> Figure | None:
    """The parts of the loss, stacked, with the stages' borders; None where nothing was logged."""
    names = loss_names(run)
    iterations, values, ends = loss_series(run.stages, names)
    if not len(iterations):
        return None
    figure, axes = new_figure(2.7)
    ax = axes[0]
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        here = (iterations > start) & (iterations <= end)
        if not here.any():
            continue
        colours = [SERIES[i % len(SERIES)] for i in range(len(names))]
        # Drawn as steps, because a log line is the mean over the iterations before it.
        edges = np.concatenate([[start], iterations[here]])
        heights = np.concatenate([values[:, here][:, :1], values[:, here]], axis=1)
        labels = [short_name(name) for name in names] if start == 0 else ()
        ax.stackplot(edges, heights, colors=colours, step='pre', labels=labels)
    _mark_stages(ax, run.stages, ends)
    ax.set_ylabel('loss, weighted')
    ax.set_ylim(bottom=min(0.0, float(values.min())))
    figure.legend(loc='outside upper left', ncols=3)
    return figure


def weight_series(stages: Sequence[StageRecord]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[int]]:
    """The logged weights of adaptive parts, all stages one after the other.

    Args:
        stages: the stages in order.

    Returns:
        By part, iterations (T,) counted over the whole run and weights (T,), with NaN between two stages; and the
        iteration at which each stage ends. Without an adaptive part there are no parts.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    ends: list[int] = []
    offset = 0
    for stage in stages:
        for line in stage.scalars:
            for name in line:
                if name.startswith(WEIGHT):
                    points.setdefault(name.removeprefix(WEIGHT), []).append((offset + line['iter'], line[name]))
        offset += stage.scalars[-1]['iter'] if stage.scalars else 0
        for own in points.values():
            own.append((offset, float('nan')))
        ends.append(offset)
    return {name: tuple(np.array(own, float).T) for name, own in points.items()}, ends


def draw_weights(run: RunRecord) -> Figure | None:
    """The weights of adaptive parts over the iterations; None where there are none."""
    series, ends = weight_series(run.stages)
    if not series:
        return None
    figure, axes = new_figure(2.2)
    ax = axes[0]
    for i, (name, (iterations, weights)) in enumerate(series.items()):
        style = series_style(i) | dict(marker='.', markersize=3)
        ax.plot(iterations, weights, label=name, **style)
    _mark_stages(ax, run.stages, ends)
    ax.set_ylabel('weight of the part')
    ax.set_ylim(bottom=0)
    figure.legend(loc='outside upper left', ncols=3)
    return figure


def _mark_stages(ax: Axes, stages: Sequence[StageRecord], ends: Sequence[int]) -> None:
    """The axis of iterations, with the numbers of the stages and the borders between them."""
    for start, end, stage in zip([0, *ends[:-1]], ends, stages, strict=True):
        if end > start:
            ax.text((start + end) / 2, 1.01, str(stage.index), ha='center', va='bottom',
                    color=MUTED, transform=ax.get_xaxis_transform())
    for end in ends[:-1]:
        ax.axvline(end, color=MUTED, linewidth=0.8, linestyle=':')
    ax.text(0, 1.01, 'stage ', ha='right', va='bottom', color=MUTED,
            transform=ax.get_xaxis_transform())
    ax.set_xlabel('iteration')
    ax.set_xlim(0, ends[-1])
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
