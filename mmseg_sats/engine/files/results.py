# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The results of a run: results.json, results.csv and the tables in the log."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prettytable import PrettyTable

from mmseg_sats.evaluation.forgetting import average_all, counted, forgetting, forgetting_per_class
from mmseg_sats.utils.checkpoint import write_json, write_text


def stage_results(
    stage: int,
    new_classes: Sequence[str],
    images: int | None,
    metrics: Mapping[str, float],
    classes: Sequence[str],
) -> dict[str, Any]:
    """One stage's entry in results.json.

    Args:
        stage: index of the stage.
        new_classes: names of the classes learned in it.
        images: number of training images; None if the stage was taken from a checkpoint.
        metrics: the results of ``IncrementalIoUMetric`` in percent, NaN for a class that no evaluation pixel
            shows.
        classes: names of background and all seen classes.
    """
    means = {key: _number(metrics[f'mIoU_{key}']) for key in ('base', 'new', 'all')}
    return dict(
        stage=stage,
        new_classes=list(new_classes),
        images=images,
        iou={name: _number(metrics[f'IoU.{name}']) for name in classes},
        mIoU=means,
        counted={key: int(metrics[f'classes_{key}']) for key in means},
        hIoU=_number(metrics['hIoU']),
    )


def run_results(identity: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of results.json.

    Args:
        identity: method, memory, dataset, protocol, setting, class_order, seed.
        stages: the finished stages' entries, in order.

    Returns:
        The dict that is written to results.json: values in percent, not rounded, None where there is no number.
    """
    last = stages[-1]
    ious = [stage['iou'] for stage in stages]
    learned_before = [name for stage in stages[:-1] for name in stage['new_classes']]
    return dict(
        **identity,
        stages=[{key: value for key, value in stage.items() if key != 'hIoU'} for stage in stages],
        final=dict(last['mIoU'], hIoU=last['hIoU']),
        average_all=average_all([stage['mIoU']['all'] for stage in stages]),
        forgetting=forgetting(ious, learned_before),
    )


def write_results(work_dir: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json, and results.csv with one row per stage and class."""
    write_json(work_dir / 'results.json', results)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(['method', 'protocol', 'setting', 'seed', 'stage', 'class', 'iou'])
    head = [results[key] for key in ('method', 'protocol', 'setting', 'seed')]
    for stage in results['stages']:
        for name, iou in stage['iou'].items():
            rows.writerow([*head, stage['stage'], name, '' if iou is None else repr(iou)])
    write_text(work_dir / 'results.csv', text.getvalue())


def _with_counted(table: PrettyTable, stages: Sequence[Mapping[str, Any]]) -> PrettyTable:
    """The table with a column that says over how many classes the means go, unless they all go over all."""
    column = [counted(stage['iou']) or str(len(stage['iou'])) for stage in stages]
    if any(counted(stage['iou']) for stage in stages):
        table.add_column('means over', column)
    return table


def stage_table(results: Mapping[str, Any]) -> PrettyTable:
    """mIoU after each stage: base, new, all; and over how many classes, if not over all seen ones."""
    table = PrettyTable(['stage', 'classes', 'images', 'base', 'new', 'all'])
    for stage in results['stages']:
        names = ', '.join(stage['new_classes'])
        table.add_row(
            [
                stage['stage'],
                names if len(names) <= 32 else f'{len(stage["new_classes"])} classes',
                _text(stage['images'], '{}'),
                *(_text(stage['mIoU'][key]) for key in ('base', 'new', 'all')),
            ]
        )
    return _with_counted(table, results['stages'])


def forgetting_table(results: Mapping[str, Any]) -> PrettyTable:
    """One row per class: its stage, its best IoU at an earlier stage, its final IoU, and the difference."""
    stages = results['stages']
    ious = [stage['iou'] for stage in stages]
    lost = forgetting_per_class(
        ious, [name for stage in stages[:-1] for name in stage['new_classes']]
    )
    table = PrettyTable(['class', 'learned in stage', 'best before', 'final', 'forgotten'])
    for stage in stages:
        for name in stage['new_classes']:
            final = ious[-1][name]
            best = lost[name] + final if name in lost else None
            shown = f'{name} (no training image)' if name in stage.get('without_images', ()) else name
            table.add_row([shown, stage['stage'], _text(best), _text(final), _text(lost.get(name))])
    return table


def comparison_table(runs: Sequence[Mapping[str, Any]]) -> PrettyTable:
    """One row per run: its final base, new, all and hIoU, the average of all over the stages, and its forgetting."""
    table = PrettyTable(['method', 'base', 'new', 'all', 'hIoU', 'average', 'forgetting'])
    for run in runs:
        table.add_row(
            [
                run['method'],
                *(_text(run['final'][key]) for key in ('base', 'new', 'all', 'hIoU')),
                _text(run['average_all']),
                _text(run['forgetting']),
            ]
        )
    return _with_counted(table, [run['stages'][-1] for run in runs])


def _number(value: float | None) -> float | None:
    """A float for JSON; None for NaN."""
    return None if value is None or math.isnan(value) else float(value)


def _text(value: float | None, form: str = '{:.2f}') -> str:
    return '-' if value is None else form.format(value)
