# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Published figures, and the tables they stand in."""

import csv
import io
from pathlib import Path

import pytest

from mmseg_sats.engine.experiments.plan import Cell, Run
from mmseg_sats.engine.experiments.report import (
    Line,
    Published,
    join_published,
    markdown,
    read_published,
    to_csv,
)
from mmseg_sats.engine.experiments.run_table import PUBLISHED, PUBLISHED_NEWER
from mmseg_sats.engine.experiments.tables import TABLES, Part, Row
from tests.shared import shared_path

FIGURES = dict(base=80.0, new=1 / 3, all=60.5, hIoU=0.7, average_all=70.0, forgetting=None)


@pytest.fixture(scope='module')
def published() -> Published:
    return read_published(PUBLISHED)


def cell(table: str, part: int, title: str, protocol: str, memory: int) -> Cell:
    """A cell of a table by its row's title."""
    parts = TABLES[table].parts_for(['joint', 'finetune', 'lwf_mc', 'sdr', 'ssul', 'sats'])
    row = next(row for row in parts[part].rows if row.title == title)
    return Cell(parts[part], row, protocol, memory)


@pytest.mark.parametrize(
    ('table', 'part', 'title', 'protocol', 'memory', 'network', 'figures'),
    [
        ('table1', 0, 'sats', '15-1', 0, 'SegFormer-B2', ['78.38', '62.02', '74.48']),
        ('table1', 0, 'sats', '10-1', 100, 'SegFormer-B2', ['76.21', '61.62', '69.27']),
        ('table1', 0, 'ssul', '5-3', 40, 'SegFormer-B2', ['76.04', '61.95', '65.98']),
        ('table1', 0, 'joint', '15-5', 0, 'SegFormer-B2', ['80.84', '74.97', '79.44']),
        ('table1', 0, 'lwf_mc', '15-1', 0, 'DeepLabV3', ['6.40', '8.90', '6.90']),
        ('table1', 0, 'sdr', '15-1', 0, 'DeepLabV3+', ['44.7', '21.8', '39.2']),
        ('table1', 0, 'sdr', '10-1', 0, '', []),
        ('table1', 0, 'sdr', '15-1', 100, '', []),
        ('table1', 0, 'finetune', '15-1', 0, '', []),
        ('table2', 0, 'sats', '25-25', 300, 'SegFormer-B2', ['57.42', '27.14', '32.36']),
        ('table3', 0, 'without attention transfer', '5-3', 100, 'SegFormer-B2', ['75.43', '62.51', '66.2']),
        ('table3', 0, 'all three', '10-1', 100, 'SegFormer-B2', ['76.21', '61.62', '69.27']),
        ('table3', 0, 'all three', '10-1', 0, '', []),
        ('table3', 1, 'last three', '15-1', 100, 'SegFormer-B2', ['79.47', '61.83', '75.28']),
        ('table4', 0, 'self-attention + feature maps', '10-1', 100, 'SegFormer-B2', ['76.52', '59.89', '68.60']),
        ('table4', 1, 'NP (no pooling)', '15-1', 100, 'SegFormer-B2', ['80.07', '61.54', '75.66']),
        ('table4', 2, 'CRP with DeepLabV3', '10-1', 100, 'DeepLabV3', ['66.61', '44.43', '56.05']),
    ],
)  # fmt: skip
def test_published_figures_stand_in_their_row(
    published: Published, table: str, part: int, title: str, protocol: str, memory: int, network: str,
    figures: list[str],
) -> None:  # fmt: skip
    there = join_published(table, cell(table, part, title, protocol, memory), published)
    assert there == (network, dict(zip(('base', 'new', 'all'), figures, strict=False)))


def test_every_published_figure_has_a_row(published: Published) -> None:
    rows = {
        (table, part.name, row.method, row.variant)
        for table, spec in TABLES.items()
        for part in spec.parts_for(
            ['joint', 'lwf_mc', 'ilt', 'mib', 'plop', 'sdr', 'recall', 'st_cil', 'ssul', 'sats']
        )
        for row in part.rows
    }
    assert {key[:4] for key in published} <= rows


def test_figures_of_newer_methods_are_shown_beside_theirs(published: Published) -> None:
    newer = read_published(PUBLISHED_NEWER)
    assert not published.keys() & newer.keys()
    methods = {key[2] for key in newer}
    assert methods <= {path.name for path in (Path(__file__).parents[1] / 'configs').iterdir()}
    assert {key[:2] for key in newer} == {('table1', 'systems')}
    figures = [figures for networks in newer.values() for figures in networks.values()]
    assert all(0 < float(figure) < 100 for each in figures for figure in each.values() if figure)
    assert all(each['all'] and bool(each['base']) == bool(each['new']) for each in figures)
    row = Cell(Part('systems', '', ()), Row('star', method='star'), '15-1', 0, ())
    assert join_published('table1', row, newer) == ('DeepLabV3', dict(base='79.5', new='50.6', all='72.9'))


def test_no_published_figure_is_lost_or_changed(published: Published) -> None:
    """Against the tables as they were typed off."""
    for name, table in (
        ('table1_voc', 'table1'), ('table2_ade20k', 'table2'), ('table3_components', 'table3'),
        ('table3_blocks', 'table3'), ('table4_ablation', 'table4'),
    ):  # fmt: skip
        with shared_path(f'paper/{name}.csv').open() as file:
            typed = [row[key] for row in csv.DictReader(file) for key in row if ':' in key and row[key]]
        parts = dict(table3_components=['components'], table3_blocks=['blocks']).get(name)
        here = [
            figure
            for key, networks in published.items()
            if key[0] == table and (parts is None or key[1] in parts)
            for figures in networks.values()
            for figure in figures.values()
        ]
        assert sorted(typed) == sorted(here)


def a_line(**figures: dict[str, float | None]) -> Line:
    runs = tuple(Run(name, Path('c.py'), ()) for name in ('one', 'two', 'three'))
    line = Line(Cell(Part('p', 'systems', ()), Row('sats'), '15-1', 40, runs))
    line.figures = dict(figures)
    line.seconds = dict.fromkeys(figures, 90.0)
    line.states = {run.name: 'not run' for run in runs if run.name not in figures}
    return line


def body(text: str) -> list[list[str]]:
    """The cells of a markdown table below its head."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[word.strip() for word in line.strip('|').split('|')] for line in lines[2:]]


def test_one_run_and_means_over_seeds() -> None:
    (row,) = body(markdown([a_line(one=FIGURES)]))
    assert row == ['sats', '40', '80.00', '0.33', '60.50', '0.70', '70.00', '-', '1.5', '1 of 3 (not run)']
    (row,) = body(markdown([a_line(one=FIGURES, two=FIGURES | dict(base=82.0))]))
    assert row[2:4] == ['81.00 ± 1.41', '0.33 ± 0.00']
    (row,) = body(markdown([a_line()]))
    assert row[2:] == ['-'] * 7 + ['0 of 3 (not run)']


def test_the_papers_columns_stand_only_where_it_has_figures() -> None:
    line = a_line(one=FIGURES)
    assert 'paper' not in markdown([line])
    line.published, line.network = dict(base='35.1', new='13.5', all='29.7'), 'DeepLabV3'
    (row,) = body(markdown([line]))
    assert row[-4:] == ['35.1', '13.5', '29.7', 'DeepLabV3']


def test_csv_holds_figures_as_they_are() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv('table1', [a_line(one=FIGURES)]))))
    assert [row['state'] for row in rows] == ['finished', 'not run', 'not run']
    assert float(rows[0]['new']) == 1 / 3
    assert rows[0]['forgetting'] == rows[1]['base'] == ''
    assert rows[0]['train_seconds'] == '90.0'


def test_over_how_many_classes_the_means_go_is_said_where_not_all_are_there() -> None:
    line = a_line(one=FIGURES, two=FIGURES)
    line.counted = dict(one='', two='11 of 12 (without background)')
    line.classes = dict(one=dict(base=9, new=3, all=12), two=dict(base=None, new=None, all=11))
    assert [row[-1] for row in body(markdown([line, a_line()]))] == ['11 of 12 (without background)', '-']
    line.counted['two'] = ''
    assert 'means over' not in markdown([line])
    rows = list(csv.DictReader(io.StringIO(to_csv('table1', [line]))))
    assert [[row[f'classes_{key}'] for key in ('base', 'new', 'all')] for row in rows] == [
        ['9', '3', '12'], ['', '', '11'], [''] * 3,
    ]  # fmt: skip
