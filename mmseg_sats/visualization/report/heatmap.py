# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The heat map of IoU per class and stage; the row of a class that is being forgotten gets darker."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mmseg_sats.visualization.report.run_record import RunRecord
from mmseg_sats.visualization.theme import (
    MUTED,
    ON_DARK_CELL,
    ON_LIGHT_CELL,
    new_figure,
    unit_colour,
)

COLOURS = 'cividis'  # made for colour-blind people; its lightness grows evenly, so it can also be printed in grey
FRAME = '#d55e00'  # stands out on every cell, on a light page and on a dark one
ROW = 0.19  # inches


def iou_matrix(run: RunRecord) -> np.ndarray:
    """IoU (classes, stages), percent; NaN before a class is learned, and where it is absent."""
    columns = [
        [stage.results['iou'].get(name) for name in run.class_names] for stage in run.stages
    ]
    return np.array(columns, dtype=float).T


def common_top(runs: Sequence[RunRecord]) -> float:
    """Where the colours of all runs' maps end: the best IoU of a foreground class, up to the next 10.

    Background is far above the rest in a weak model, and would leave it all dark.
    """
    best = max((float(np.nanmax(iou_matrix(run)[1:], initial=0.0)) for run in runs), default=0.0)
    return min(100.0, max(10.0, 10 * np.ceil(best / 10)))


def draw_heatmap(
    run: RunRecord, palette: Mapping[str, Sequence[int]], top: float = 100.0
) -> Figure:
    """IoU per class and stage.

    A frame marks the stage that taught a class. Before it there is no cell.

    Args:
        run: the run.
        palette: RGB of the classes by name, drawn beside the names.
        top: the value of the lightest colour; what is above it is as light.
    """
    values = iou_matrix(run)
    rows, columns = values.shape
    figure, axes = new_figure(1.0 + ROW * rows)
    ax = axes[0]
    colours = matplotlib.colormaps[COLOURS]
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=top, edgecolors='none'
    )
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = ON_LIGHT_CELL if value > top / 2 else ON_DARK_CELL
            ax.text(column + 0.5, row + 0.5, f'{value:.0f}', color=ink, ha='center', va='center',
                    fontsize=7)
    _mark_learning(ax, run)
    ax.set_yticks(np.arange(rows) + 0.5, run.class_names)
    ax.set_xticks(np.arange(columns) + 0.5, [stage.index for stage in run.stages])
    ax.set_xlabel('after stage')
    ax.tick_params(length=0)
    ax.tick_params(axis='y', pad=13)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.invert_yaxis()
    _swatches(ax, [palette.get(name) for name in run.class_names])
    bar = figure.colorbar(mesh, ax=ax, location='top', aspect=40, shrink=0.9, pad=0.01,
                          extend='max' if np.nanmax(values) > top else 'neither')
    bar.set_label('IoU in %')
    bar.locator = MaxNLocator(5)
    bar.outline.set_visible(False)
    return figure


def _mark_learning(ax: Axes, run: RunRecord) -> None:
    names = run.class_names
    for column, stage in enumerate(run.stages):
        rows = [names.index(name) for name in stage.results['new_classes'] if name in names]
        if rows and len(run.stages) > 1:
            ax.add_patch(
                Rectangle((column, min(rows)), 1, len(rows), fill=False, edgecolor=FRAME,
                          linewidth=1.6, clip_on=False)
            )


def _swatches(ax: Axes, colours: Sequence[Sequence[int] | None]) -> None:
    """A square of each class's own colour between its name and its row."""
    across = ax.get_yaxis_transform()
    for row, colour in enumerate(colours):
        if colour is not None:
            ax.plot(-0.02, row + 0.5, 's', transform=across, clip_on=False, markersize=6,
                    markerfacecolor=unit_colour(colour), markeredgecolor=MUTED,
                    markeredgewidth=0.6)
