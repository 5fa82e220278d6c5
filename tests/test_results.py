# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a run reports, on three stages made up by hand."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmseg_sats.engine.evaluation import own_metrics
from mmseg_sats.engine.files.results import (
    comparison_table,
    forgetting_table,
    run_results,
    stage_results,
    stage_table,
    write_results,
)
from mmseg_sats.evaluation.forgetting import counted

NAN = float('nan')
IDENTITY: dict[str, Any] = dict(
    method='sats', memory=0, dataset='shapes', protocol='2-1', setting='overlapped',
    class_order=[1, 2, 3, 4], seed=0,
)
CLASSES = ['background', 'circle', 'square', 'star', 'moon']
NEW = [['circle', 'square'], ['star'], ['moon']]
IOUS = [
    [90.0, 60.0, NAN],
    [85.0, 70.5, 50.0, 40.0],
    [80.0, 30.0, 55.0, NAN, 1 / 3],
]
MEANS = [
    dict(base=75.0, new=NAN, all=75.0, hIoU=NAN),
    dict(base=68.5, new=40.0, all=61.375, hIoU=50.5),
    dict(base=55.0, new=1 / 3, all=41.0, hIoU=0.6),
]


def metrics_of(stage: int) -> dict[str, float]:
    """As ``IncrementalIoUMetric`` returns them."""
    means = MEANS[stage]
    named = zip(CLASSES, IOUS[stage], strict=False)
    there = [not math.isnan(value) for value in IOUS[stage]]
    return {
        'classes_base': sum(there[:3]),
        'classes_new': sum(there[3:]),
        'classes_all': sum(there),
        **{f'mIoU_{key}': means[key] for key in ('base', 'new', 'all')},
        'hIoU': means['hIoU'],
        'mIoU': means['all'],
        **{f'IoU.{name}': value for name, value in named},
    }


def make_stages(count: int = 3) -> list[dict[str, Any]]:
    return [
        stage_results(k, NEW[k], None if k == 0 else 10 + k, metrics_of(k), CLASSES[: len(IOUS[k])])
        for k in range(count)
    ]


def make_results(count: int = 3, **identity: Any) -> dict[str, Any]:
    return run_results(IDENTITY | identity, make_stages(count))


def test_the_keys_are_those_of_the_contract() -> None:
    results = make_results()
    assert list(results) == [
        'method', 'memory', 'dataset', 'protocol', 'setting', 'class_order', 'seed', 'stages', 'final',
        'average_all', 'forgetting',
    ]
    for stage in results['stages']:
        assert set(stage) == {'stage', 'new_classes', 'images', 'iou', 'mIoU', 'counted'}
        assert set(stage['mIoU']) == set(stage['counted']) == {'base', 'new', 'all'}
    assert set(results['final']) == {'base', 'new', 'all', 'hIoU'}
    assert {key: results[key] for key in IDENTITY} == IDENTITY


def test_a_stage_says_what_was_measured_and_null_where_nothing_was() -> None:
    first, second, third = make_results()['stages']
    assert first == dict(
        stage=0, new_classes=['circle', 'square'], images=None,
        iou=dict(background=90.0, circle=60.0, square=None), mIoU=dict(base=75.0, new=None, all=75.0),
        counted=dict(base=2, new=0, all=2),
    )
    assert second['images'] == 11
    assert second['mIoU'] == dict(base=68.5, new=40.0, all=61.375)
    assert third['iou']['star'] is None
    # Not rounded.
    assert third['iou']['moon'] == 1 / 3


def test_the_end_of_a_run() -> None:
    results = make_results()
    assert results['final'] == dict(base=55.0, new=1 / 3, all=41.0, hIoU=0.6)
    assert results['average_all'] == pytest.approx((75.0 + 61.375 + 41.0) / 3)
    # circle fell from 70.5 to 30, square rose from 50 to 55; star has no value at the end,
    # background is no foreground class, moon was learned last.
    assert results['forgetting'] == pytest.approx(((70.5 - 30.0) + (50.0 - 55.0)) / 2)


def test_a_run_of_one_stage_has_nothing_to_forget() -> None:
    results = make_results(1)
    assert results['forgetting'] is None
    assert results['final'] == dict(base=75.0, new=None, all=75.0, hIoU=None)
    assert results['average_all'] == 75.0


def test_a_class_without_a_training_image_is_marked() -> None:
    stages = make_stages()
    stages[1]['without_images'] = [NEW[1][0]]
    text = str(forgetting_table(run_results(IDENTITY, stages)))
    assert f'{NEW[1][0]} (no training image)' in text
    assert text.count('no training image') == 1


def test_the_stages_given_are_left_alone() -> None:
    stages = make_stages()
    run_results(IDENTITY, stages)
    assert stages == make_stages()


def test_a_metric_that_is_missing_is_named() -> None:
    metrics = metrics_of(0)
    del metrics['IoU.circle']
    with pytest.raises(KeyError, match=r'IoU\.circle'):
        stage_results(0, NEW[0], 5, metrics, CLASSES[:3])


def refuse(name: str) -> None:
    raise AssertionError(f'{name} is no JSON')


@pytest.mark.parametrize('count', [1, 3])
def test_the_files_hold_the_results(tmp_path: Path, count: int) -> None:
    results = make_results(count)
    write_results(tmp_path, results)
    text = (tmp_path / 'results.json').read_text()
    assert json.loads(text, parse_constant=refuse) == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ['results.csv', 'results.json']


def test_the_csv_has_a_row_per_stage_and_class(tmp_path: Path) -> None:
    write_results(tmp_path, make_results())
    with (tmp_path / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['method', 'protocol', 'setting', 'seed', 'stage', 'class', 'iou']
    expected = [(str(k), CLASSES[i], value) for k, ious in enumerate(IOUS) for i, value in enumerate(ious)]
    assert len(rows) == len(expected) == 12
    for row, (stage, name, value) in zip(rows, expected, strict=True):
        assert (row['method'], row['protocol'], row['setting'], row['seed']) == ('sats', '2-1', 'overlapped', '0')
        assert (row['stage'], row['class']) == (stage, name)
        # Every digit is there; an absent class is empty.
        assert row['iou'] == '' if math.isnan(value) else float(row['iou']) == value


def test_a_class_name_with_a_comma_stays_one_field(tmp_path: Path) -> None:
    stage = stage_results(
        0, ['sea, "wet"'], 1, metrics_of(0) | {'IoU.sea, "wet"': 2.0},
        ['sea, "wet"'],
    )
    write_results(tmp_path, run_results(IDENTITY, [stage]))
    with (tmp_path / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['class'], row['iou']) for row in rows] == [('sea, "wet"', '2.0')]


def cells(table: Any) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in table.rows]


def test_the_table_of_stages() -> None:
    assert cells(stage_table(make_results())) == [
        ['0', 'circle, square', '-', '75.00', '-', '75.00', '2 of 3 (without square)'],
        ['1', 'star', '11', '68.50', '40.00', '61.38', '4'],
        ['2', 'moon', '12', '55.00', '0.33', '41.00', '4 of 5 (without star)'],
    ]
    results = make_results()
    results['stages'][0]['new_classes'] = [f'class number {i}' for i in range(50)]
    assert cells(stage_table(results))[0][1] == '50 classes'


def test_the_table_of_what_was_forgotten() -> None:
    assert cells(forgetting_table(make_results())) == [
        ['circle', '0', '70.50', '30.00', '40.50'],
        ['square', '0', '50.00', '55.00', '-5.00'],
        ['star', '1', '-', '-', '-'],
        ['moon', '2', '-', '0.33', '-'],
    ]
    assert cells(forgetting_table(make_results(1)))[1] == ['square', '0', '-', '-', '-']


def test_the_table_that_compares_runs() -> None:
    table = comparison_table([make_results(), make_results(1, method='joint')])
    assert cells(table) == [
        ['sats', '55.00', '0.33', '41.00', '0.60', '59.12', '17.75', '4 of 5 (without star)'],
        ['joint', '75.00', '-', '75.00', '-', '75.00', '-', '2 of 3 (without square)'],
    ]
    assert 'forgetting' in str(table)
    # Results that went through the file look the same.
    again = json.loads(json.dumps(make_results()))
    assert str(stage_table(again)) == str(stage_table(make_results()))


def test_the_tables_have_no_column_for_it_where_the_means_go_over_all_classes() -> None:
    results = make_results()
    for stage in results['stages']:
        del stage['counted']  # a run of an earlier version
        stage['iou'] = {name: value or 0.0 for name, value in stage['iou'].items()}
    assert stage_table(results).field_names[-1] == 'all'
    assert comparison_table([results]).field_names[-1] == 'forgetting'


def test_many_classes_that_no_pixel_shows_are_counted() -> None:
    assert counted(dict.fromkeys('abcd') | dict(e=1.0)) == '1 of 5'


def test_a_prefix_of_the_metric_is_taken_off() -> None:
    mine = {'mIoU_base': 1.0, 'IoU.a/b': 2.0}
    assert own_metrics(mine) == mine
    given = {'ours/mIoU_base': 1.0, 'ours/IoU.a/b': 2.0, 'mIoU': 3.0, 'mAcc': 4.0}
    assert own_metrics(given) == mine
    with pytest.raises(KeyError, match=r"gave \['mAcc', 'mIoU'\]: expected IncrementalIoUMetric in it"):
        own_metrics({'mIoU': 3.0, 'mAcc': 4.0})
