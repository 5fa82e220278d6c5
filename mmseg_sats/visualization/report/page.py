# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The report: one page that opens from disk, with its pictures inside, and as files for a paper."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from mmengine.logging import print_log

from mmseg_sats.evaluation.forgetting import counted
from mmseg_sats.utils.checkpoint import write_text
from mmseg_sats.utils.spelling import check_choice
from mmseg_sats.visualization import theme
from mmseg_sats.visualization.report import curves, heatmap, losses
from mmseg_sats.visualization.report.pictures import Album, photographs
from mmseg_sats.visualization.report.rendering import page_environment
from mmseg_sats.visualization.report.run_record import (
    RunRecord,
    Sweep,
    config_differences,
    find_sweeps,
    load_runs,
)
from mmseg_sats.visualization.stage_model import stage_palette

# How many photographs and pictures of attention there are where nobody says so.
OPTIONS = {'images': 4, 'attention': 2}


def check_report_options(options: Mapping[str, Any]) -> dict[str, int]:
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


def write_report(
    work_dirs: Sequence[str | Path],
    out: str | Path,
    images: int = OPTIONS['images'],
    attention: int = OPTIONS['attention'],
) -> Path:
    """Writes ``index.html`` and every picture as PNG and PDF.

    Args:
        work_dirs: one run or several. Photographs are those of the first run's evaluation data.
        out: folder to write into, made where it is missing.
        images: photographs in the panel; 0 leaves it out.
        attention: pictures of attention; 0 leaves them out.

    Returns:
        The page. What it lacks is said on it, and logged.

    Raises:
        FileNotFoundError: a work dir holds no finished stage.
        ValueError: a file is not what a run writes, or an option is out of range.
    """
    check_report_options(dict(images=images, attention=attention))
    runs = load_runs(work_dirs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    album = Album(out, [])
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
        weights=_weights(album, runs),
        costs=_costs(album, runs),
        differences=config_differences(runs),
    )
    page |= photographs(album, runs, images, attention)
    page['heatmaps'] = _heatmaps(album, runs)
    page['notes'] = album.notes
    for note in album.notes:
        print_log(note, logger='current', level=logging.WARNING)
    write_text(out / 'index.html', _render(page))
    return out / 'index.html'


def _heatmaps(album: Album, runs: Sequence[RunRecord]) -> list[theme.Picture]:
    top = heatmap.common_top(runs)
    return [
        album.draw(
            f'iou_by_class_{i}',
            f'IoU of every class after every stage of {run.label}',
            partial(heatmap.draw_heatmap, run, stage_palette(run.stages[-1].folder), top),
        )
        for i, run in enumerate(runs)
    ]


def _losses(album: Album, runs: Sequence[RunRecord]) -> list[theme.Picture | None]:
    return [
        album.draw(
            f'losses_{i}',
            f'The parts of the loss of {run.label}, stacked, over all stages',
            partial(losses.draw_losses, run),
        )
        for i, run in enumerate(runs)
    ]


def _weights(album: Album, runs: Sequence[RunRecord]) -> list[theme.Picture | None]:
    return [
        album.draw(
            f'weights_{i}',
            f'The measured weights of the parts of the loss of {run.label} over all stages',
            partial(losses.draw_weights, run),
        )
        if losses.weight_series(run.stages)[0]
        else None
        for i, run in enumerate(runs)
    ]


def _sweeps(album: Album, runs: Sequence[RunRecord]) -> list[tuple[Sweep, theme.Picture]]:
    return [
        (sweep, album.draw(
            f'sweep_{i}', f'mIoU of {sweep.method} against {sweep.key}', partial(curves.draw_sweep, sweep)
        ))
        for i, sweep in enumerate(find_sweeps(runs))
    ]  # fmt: skip


def _costs(album: Album, runs: Sequence[RunRecord]) -> theme.Picture | None:
    if all(stage.seconds is None for run in runs for stage in run.stages):
        return None
    return album.draw(
        'costs', 'Minutes of training and memory, per stage and run', partial(curves.draw_costs, runs)
    )


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
    environment = page_environment()
    environment.filters['counted'] = counted
    environment.globals.update(
        number=_number,
        best=_best,
        loss_names=losses.loss_names,
        short_name=losses.short_name,
        repr=repr,
        counted=counted,
    )
    return environment.get_template('report.html.j2').render(page)


def write_run_report(work_dir: str | Path, options: Mapping[str, Any]) -> Path | None:
    """The report of one run at its end; a failure is a warning, for the run itself is done.

    Args:
        work_dir: the run's.
        options: as for :func:`check_report_options`.

    Returns:
        The page, or None where it failed.
    """
    try:
        return write_report([work_dir], Path(work_dir) / 'report', **check_report_options(options))
    except Exception as error:
        print_log(
            f'the report of {work_dir} could not be written ({type(error).__name__}: {error}); '
            f'the run is complete. `mmseg-sats report {work_dir}` tries again',
            logger='current',
            level=logging.WARNING,
        )
        return None
