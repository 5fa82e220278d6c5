# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The report's album of pictures, and those that need models and data: photographs, attention."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmseg_sats.datasets.folder import IGNORED_COLOUR
from mmseg_sats.visualization import attention_view, panel, theme
from mmseg_sats.visualization.masks import encode
from mmseg_sats.visualization.report.run_record import RunRecord
from mmseg_sats.visualization.stage_model import StageModel, eval_dataset, load_stage

_NAMED = 6  # classes of a photograph that are named below it
# Errors of reading a run's data or model after these have moved: that part is left out.
_ABSENT = (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError)


@dataclass(eq=False)
class Album:
    """Draws the pictures into a folder, and notes what could not be drawn.

    Args:
        out: the folder; must exist.
        notes: sentences for the page.
    """

    out: Path
    notes: list[str]

    def draw(self, name: str, alt: str, make: Callable[[], Figure | None]) -> theme.Picture | None:
        """Draws and keeps one figure; None where there is nothing to draw."""
        with theme.style():
            figure = make()
            return None if figure is None else theme.finish(figure, self.out, name, alt)


def photographs(
    album: Album, runs: Sequence[RunRecord], images: int, attention: int
) -> dict[str, Any]:
    """The panel, its legend and the pictures of attention, as far as models and data are there."""
    parts: dict[str, Any] = dict(panel=None, rows=[], legend=[], attention=[])
    if images == 0 and attention == 0:
        return parts
    models = _models(album, runs)
    if not models:
        return parts
    first = next(iter(models.values()))
    try:
        samples = panel.panel_samples(eval_dataset(first.cfg), max(images, attention))
    except _ABSENT as error:
        album.notes.append(f'No photographs: the evaluation data could not be read ({error}).')
        return parts
    if images:
        rows = panel.panel_rows(models, samples[:images])
        parts['panel'] = album.draw(
            'photographs', 'Photographs with truth and predictions', partial(panel.draw_panel, rows)
        )
        parts['rows'] = [_row_tiles(row) for row in rows]
        parts['legend'] = _legend(models, rows)
    if attention:
        parts['attention'] = _attention(album, runs, models, samples[:attention])
    return parts


def _models(album: Album, runs: Sequence[RunRecord]) -> dict[str, StageModel]:
    """The last stage's model of every run on the first run's data set that can be read."""
    models = {}
    for run in runs:
        if run.results['dataset'] != runs[0].results['dataset']:
            album.notes.append(
                f'{run.label} has no photographs: its data set is {run.results["dataset"]}, that '
                f'of {runs[0].label} {runs[0].results["dataset"]}.'
            )
            continue
        try:
            models[run.label] = load_stage(run.stages[-1].folder)
        except _ABSENT as error:
            album.notes.append(f'{run.label} has no photographs: {error}.')
    return models


def _legend(
    models: Mapping[str, StageModel], rows: Sequence[panel.PanelRow]
) -> list[tuple[str, str]]:
    """Name and colour of background, of every class that truth or a prediction shows, and of ignored pixels."""
    shown = {name for row in rows for name in row.shown}
    colours = {
        name: '#{:02x}{:02x}{:02x}'.format(*colour)
        for model in models.values()
        for name, colour in zip(model.classes, model.palette, strict=True)
    }
    first = next(iter(models.values())).classes[0]
    legend = [(f'{first}: the photograph as it is', 'transparent')]
    legend += [(name, colour) for name, colour in colours.items() if name in shown]
    if any(row.ignored for row in rows):
        legend.append(('ignored', '#{:02x}{:02x}{:02x}'.format(*IGNORED_COLOUR)))
    return legend


def _row_tiles(row: panel.PanelRow) -> dict[str, Any]:
    tiles = {
        name: theme.data_uri(encode(tile, '.jpg'), 'image/jpeg') for name, tile in row.tiles.items()
    }
    more = len(row.classes) - _NAMED
    classes = ', '.join(row.classes[:_NAMED]) + (f' and {more} more' if more > 0 else '')
    return dict(name=row.name, classes=classes, tiles=tiles)


def _attention(
    album: Album,
    runs: Sequence[RunRecord],
    models: Mapping[str, StageModel],
    samples: Sequence[dict[str, Any]],
) -> list[theme.Picture]:
    """What a class learned earlier attends to before and after the last stage, for the first run
    of several stages whose backbone has attention."""
    for run in runs:
        new = models.get(run.label)
        if new is None or len(run.stages) < 2:
            continue
        if not hasattr(new.model.backbone, 'forward_with_attention'):
            continue
        try:
            old = load_stage(run.stages[-2].folder)
        except _ABSENT as error:
            album.notes.append(f'{run.label} has no pictures of attention: {error}.')
            continue
        return list(_attention_pictures(album, run, old, new, samples))
    return []


def _attention_pictures(
    album: Album,
    run: RunRecord,
    old: StageModel,
    new: StageModel,
    samples: Sequence[dict[str, Any]],
) -> Iterator[theme.Picture]:
    for i, sample in enumerate(samples):
        labels = sample['data_samples'].gt_sem_seg.data[0].long()
        counts = np.bincount(labels.flatten().numpy(), minlength=256)[1 : len(old.classes)]
        if not counts.any():
            continue
        channel = int(counts.argmax()) + 1
        views, _ = attention_view.view_classes(old, new, sample, channel, labels)
        image = panel.sample_image(sample)
        name = Path(sample['data_samples'].img_path).name
        what = f'{new.classes[channel]} in {name}'
        where = labels.numpy() == channel
        draw = partial(attention_view.draw_attention, image, views, what, where)
        alt = f'Attention from {what}: old and new model of the last stage of {run.label}'
        yield album.draw(f'attention_{i}', alt, draw)
