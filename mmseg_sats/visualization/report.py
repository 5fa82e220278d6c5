# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The report: one page that opens from disk, with its pictures inside, and as files for a paper.

    python -m mmseg_sats.visualization.report WORK_DIR [WORK_DIR ...] [--out DIR]
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from mmengine.logging import print_log

from mmseg_sats.checkpoint import write_text
from mmseg_sats.suggest import check_choice
from mmseg_sats.visualization import attention_view, curves, heatmap, losses, panel, theme
from mmseg_sats.visualization.masks import encode
from mmseg_sats.visualization.run_record import (
    RunRecord,
    config_differences,
    find_sweeps,
    load_runs,
)
from mmseg_sats.visualization.stage_model import (
    StageModel,
    eval_dataset,
    load_stage,
    stage_palette,
)

OPTIONS = {'images': 4, 'attention': 2}
# What reading a run's data or model may raise where these have moved: that part is left out.
_ABSENT = (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError)


def check_options(options: Mapping[str, Any]) -> dict[str, int]:
    """The report's options with their defaults.

    Args:
        options: ``images``, how many photographs the panel has, and ``attention``, how many
            pictures of attention there are; 0 leaves a part out.

    Raises:
        ValueError: an unknown option, or not a number from 0 on.
    """
    for name, value in options.items():
        check_choice('report', name, OPTIONS)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f'report.{name}={value!r}: expected a number of pictures, 0 or more')
    return OPTIONS | dict(options)


@dataclass(eq=False)
class _Album:
    """Pictures drawn so far, and what could not be drawn."""

    out: Path
    notes: list[str]

    def draw(self, name: str, alt: str, make: Callable[[], Figure | None]) -> theme.Picture | None:
        """Draws and keeps one figure; None where there is nothing to draw."""
        with theme.style():
            figure = make()
            return None if figure is None else theme.finish(figure, self.out, name, alt)


def write_report(
    work_dirs: Sequence[str | Path], out: str | Path, images: int = 4, attention: int = 2
) -> Path:
    """Writes ``index.html`` and every picture as PNG and PDF.

    Args:
        work_dirs: one run or several. Photographs are those of the first run's evaluation data.
        out: folder to write into, made where it is missing.
        images: photographs in the panel; 0 leaves it out.
        attention: pictures of attention; 0 leaves them out.

    Returns:
        The page.

    Raises:
        FileNotFoundError: a work dir holds no finished stage.
        ValueError: a file is not what a run writes, or an option is out of range.
    """
    check_options(dict(images=images, attention=attention))
    runs = load_runs(work_dirs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    album = _Album(out, [])
    page = dict(
        runs=runs,
        curves=album.draw(
            'miou_by_stage', 'mIoU after each stage, one line per run', partial(curves.draw_curves, runs)
        ),
        old_new=album.draw(
            'old_and_new', 'Base and later classes after the last stage, bars per run',
            partial(curves.draw_old_new, runs),
        ),
        sweeps=_sweeps(album, runs),
        losses=_losses(album, runs),
        costs=_costs(album, runs),
        differences=config_differences(runs),
    )
    page |= _photographs(album, runs, images, attention)
    page['heatmaps'] = _heatmaps(album, runs)
    page['notes'] = album.notes
    write_text(out / 'index.html', _render(page))
    return out / 'index.html'


def _heatmaps(album: _Album, runs: Sequence[RunRecord]) -> list[theme.Picture]:
    top = heatmap.common_top(runs)
    return [
        album.draw(
            f'iou_by_class_{i}',
            f'IoU of every class after every stage of {run.label}',
            partial(heatmap.draw_heatmap, run, stage_palette(run.stages[-1].folder), top),
        )
        for i, run in enumerate(runs)
    ]


def _losses(album: _Album, runs: Sequence[RunRecord]) -> list[theme.Picture | None]:
    return [
        album.draw(
            f'losses_{i}',
            f'The parts of the loss of {run.label}, stacked, over all stages',
            partial(losses.draw_losses, run),
        )
        for i, run in enumerate(runs)
    ]


def _sweeps(album: _Album, runs: Sequence[RunRecord]) -> list[theme.Picture]:
    return [
        album.draw(
            f'sweep_{i}', f'mIoU against {sweep.key}', partial(curves.draw_sweep, sweep)
        )
        for i, sweep in enumerate(find_sweeps(runs))
    ]


def _costs(album: _Album, runs: Sequence[RunRecord]) -> theme.Picture | None:
    if all(stage.seconds is None for run in runs for stage in run.stages):
        return None
    return album.draw(
        'costs', 'Minutes of training and memory, per stage and run', partial(curves.draw_costs, runs)
    )


def _photographs(
    album: _Album, runs: Sequence[RunRecord], images: int, attention: int
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


def _models(album: _Album, runs: Sequence[RunRecord]) -> dict[str, StageModel]:
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
    """Name and colour of every class that truth or a prediction of the panel shows."""
    shown = {name for row in rows for name in row.shown}
    colours = {
        name: '#{:02x}{:02x}{:02x}'.format(*colour)
        for model in models.values()
        for name, colour in zip(model.classes, model.palette, strict=True)
    }
    return [(name, colour) for name, colour in colours.items() if name in shown]


def _row_tiles(row: panel.PanelRow) -> dict[str, Any]:
    tiles = {
        name: theme.data_uri(encode(tile, '.jpg'), 'image/jpeg') for name, tile in row.tiles.items()
    }
    return dict(name=row.name, classes=row.classes, tiles=tiles)


def _attention(
    album: _Album,
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
    album: _Album,
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


def _number(value: float | None, run: int, key: str, form: str = '{:.2f}') -> Markup:
    """A number of a run with the exact value and where it comes from, or a dash."""
    if value is None:
        return Markup('<span class="none">–</span>')
    return Markup('<data value="{}" data-run="{}" data-key="{}">{}</data>').format(
        repr(value), run, key, form.format(value)
    )


def _best(runs: Sequence[RunRecord], key: str) -> float | None:
    """The best value of a column; the least forgetting is the best."""
    values = [run.results['final'].get(key, run.results.get(key)) for run in runs]
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return None
    return min(present) if key == 'forgetting' else max(present)


def _render(page: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader('mmseg_sats.visualization'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        number=_number,
        best=_best,
        loss_names=losses.loss_names,
        short_name=losses.short_name,
        repr=repr,
    )
    return environment.get_template('report.html.j2').render(page)


def write_run_report(work_dir: str | Path, options: Mapping[str, Any]) -> Path | None:
    """The report of one run at its end; a failure is a warning, for the run itself is done.

    Args:
        work_dir: the run's.
        options: as for :func:`check_options`.

    Returns:
        The page, or None where it failed.
    """
    try:
        return write_report([work_dir], Path(work_dir) / 'report', **check_options(options))
    except Exception as error:
        print_log(
            f'the report of {work_dir} could not be written ({type(error).__name__}: {error}); '
            f'the run is complete. `python tools/report.py {work_dir}` tries again',
            logger='current',
            level=logging.WARNING,
        )
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description='One page with the curves and pictures of runs')
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help="a run's work dir")
    parser.add_argument(
        '--out',
        type=Path,
        help='folder to write into (default: WORK_DIR/report; of several runs, report beside the first)',
    )
    parser.add_argument('--images', type=int, default=OPTIONS['images'], help='photographs')
    parser.add_argument(
        '--attention', type=int, default=OPTIONS['attention'], help='pictures of attention'
    )
    args = parser.parse_args(arguments)
    first = Path(args.work_dirs[0])
    out = args.out or (first if len(args.work_dirs) == 1 else first.parent) / 'report'
    try:
        page = write_report(args.work_dirs, out, args.images, args.attention)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f'wrote {page}, and its pictures as PNG and PDF beside it')


if __name__ == '__main__':
    main()
