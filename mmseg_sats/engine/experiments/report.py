# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The measured figures of a table beside the published ones, as markdown and CSV."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from prettytable import PrettyTable, TableStyle

from mmseg_sats.engine.experiments.plan import Cell
from mmseg_sats.engine.experiments.record import Record
from mmseg_sats.evaluation.forgetting import counted

MEANS = ('base', 'new', 'all', 'hIoU')
MEASURED = (*MEANS, 'average_all', 'forgetting')
PUBLISHED = ('base', 'new', 'all')
NETWORKS = dict(deeplabv3='DeepLabV3')
COMPARED = 'SegFormer-B2'

Published = dict[tuple[str, ...], dict[str, dict[str, str]]]


@dataclass
class Line:
    """One line of a table: a cell and the state and figures of its runs.

    Attributes:
        cell: a row on one protocol, with or without memory.
        figures: run name to its figures, percent, None where there is none; finished runs only.
        seconds: run name to the seconds that training took; finished runs only.
        states: run name to a word for every run that is not finished.
        counted: run name to a text that says which classes the means leave out, empty for none; finished runs only.
        classes: run name to the number of classes that base, new and all are means of, None where a run of an
            earlier version does not say it; finished runs only.
        published: the paper's base, new, all as printed there, empty where it has none.
        network: the network they were published for.
    """

    cell: Cell
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    counted: dict[str, str] = field(default_factory=dict)
    classes: dict[str, dict[str, int | None]] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    network: str = ''

    def add(self, run: str, last: Mapping[str, Any], figures: Mapping[str, float | None]) -> None:
        """Adds a finished run.

        Args:
            run: its name.
            last: the entry of its last stage in results.json.
            figures: its figures by ``MEASURED``; None and those left out are shown as ``-``.
        """
        self.figures[run] = {key: figures.get(key) for key in MEASURED}
        self.counted[run] = counted(last['iou'])
        # Of a run of an earlier version, the IoUs tell how many classes the mean of all went over.
        there = sum(iou is not None for iou in last['iou'].values())
        self.classes[run] = last.get('counted', {'base': None, 'new': None, 'all': there})


def read_published(*paths: Path) -> Published:
    """Published figures: (table, part, method, variant, memory, protocol) to network to base, new, all.

    Lines that begin with ``#`` name the source.
    """
    figures: Published = {}
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith('#')]
        for row in csv.DictReader(lines):
            key = tuple(row[name] for name in ('table', 'part', 'method', 'variant', 'memory', 'protocol'))
            figures.setdefault(key, {})[row['network']] = {name: row[name] for name in PUBLISHED}
    return figures


def join_published(table: str, cell: Cell, figures: Published) -> tuple[str, dict[str, str]]:
    """Network and figures that the paper has for a cell; empty where it has none.

    If the paper has several networks, the row's own is used: SegFormer-B2 unless the row names another.
    """
    memory = 'yes' if cell.memory else 'no'
    row = cell.row
    there = figures.get(
        (table, cell.part.name, row.method, row.variant, memory, cell.protocol), {}
    )
    wanted = NETWORKS.get(row.model or '', COMPARED)
    network = wanted if wanted in there else next(iter(there), '')
    return network, there.get(network, {})


def make_lines(
    table: str, cells: Sequence[Cell], records: Mapping[str, Record], figures: Published
) -> list[Line]:
    """One line for each cell.

    Args:
        table: the table's name.
        cells: its cells.
        records: run name to its record.
        figures: the published figures.
    """
    lines = []
    for cell in cells:
        network, published = join_published(table, cell, figures)
        line = Line(cell, published=published, network=network)
        for run in cell.runs:
            _add_run(line, records[run.name])
        lines.append(line)
    return lines


def _add_run(line: Line, record: Record) -> None:
    name = record.run.name
    if record.conflict():
        line.states[name] = 'another run'
        return
    results = record.results()
    if results is None:
        done = record.stages_done()
        line.states[name] = f'{done} of {record.asked.num_stages} stages' if done else 'not run'
        return
    line.add(name, results['stages'][-1], {**results, **results['final']})
    line.seconds[name] = record.train_seconds()


def section_of(line: Line) -> tuple[str, str]:
    """The title and the protocol of the section that a line stands in."""
    return line.cell.part.title, line.cell.protocol


def markdown(lines: Sequence[Line]) -> str:
    """A table for each part and protocol; means and standard deviations where there are several seeds."""
    texts = []
    for (title, protocol), group in groupby(lines, section_of):
        texts.append(f'### {protocol}: {title}\n\n{_section(list(group))}')
    return '\n\n'.join(texts) + '\n'


def _section(lines: Sequence[Line]) -> str:
    with_paper = any(line.published for line in lines)
    head = ['row', 'memory', *MEANS, 'average', 'forgetting', 'minutes', 'runs']
    counts = [', '.join(dict.fromkeys(filter(None, line.counted.values()))) for line in lines]
    if any(counts):
        head.append('means over')
    if with_paper:
        head += [*(f'paper {key}' for key in PUBLISHED), "paper's network"]
    table = PrettyTable(head)
    table.set_style(TableStyle.MARKDOWN)
    for line, count in zip(lines, counts, strict=True):
        rows = list(line.figures.values())
        cells = [_mean([row[key] for row in rows]) for key in MEASURED]
        minutes = _mean([seconds / 60 for seconds in line.seconds.values()], '{:.1f}')
        row = [line.cell.row.title, line.cell.memory or '-', *cells, minutes, _state(line)]
        if any(counts):
            row.append(count or ('all' if line.figures else '-'))
        if with_paper:
            row += [*(line.published.get(key) or '-' for key in PUBLISHED), line.network or '-']
        table.add_row(row)
    return table.get_string()


def _state(line: Line) -> str:
    if not line.cell.runs:
        return 'no config'
    states = ', '.join(dict.fromkeys(line.states.values()))
    return f'{len(line.figures)} of {len(line.cell.runs)}' + (f' ({states})' if states else '')


def _mean(values: Sequence[float | None], form: str = '{:.2f}') -> str:
    if not values or None in values:
        return '-'
    text = form.format(statistics.mean(values))
    return f'{text} ± {form.format(statistics.stdev(values))}' if len(values) > 1 else text


def to_csv(table: str, lines: Sequence[Line]) -> str:
    """One row for each run, figures as in results.json; a line without a run has one for the paper alone."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(
        ['table', 'part', 'row', 'method', 'variant', 'memory', 'protocol', 'run', 'state', *MEASURED,
         *(f'classes_{key}' for key in PUBLISHED), 'train_seconds',
         *(f'paper_{key}' for key in PUBLISHED), 'paper_network']
    )  # fmt: skip
    for line in lines:
        cell = line.cell
        head = [table, cell.part.name, cell.row.title, cell.row.method, cell.row.variant, cell.memory,
                cell.protocol]  # fmt: skip
        tail = [*(line.published.get(key, '') for key in PUBLISHED), line.network]
        for name in [run.name for run in cell.runs] or ['']:
            figures: dict[str, Any] = line.figures.get(name, {})
            state = 'finished' if figures else line.states.get(name, 'no config')
            values = [_exact(figures.get(key)) for key in MEASURED]
            values += [_exact(line.classes.get(name, {}).get(key)) for key in PUBLISHED]
            rows.writerow([*head, name, state, *values, _exact(line.seconds.get(name)), *tail])
    return text.getvalue()


def _exact(value: float | None) -> str:
    return '' if value is None else repr(value)
