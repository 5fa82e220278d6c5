# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The model of stage 0, never trained again, as a row of a table: a method below it has lost more than it learned."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mmseg_sats.engine.experiments.plan import Cell
from mmseg_sats.engine.experiments.record import Record
from mmseg_sats.engine.experiments.report import Line, section_of
from mmseg_sats.engine.experiments.tables import Row
from mmseg_sats.utils.installed import TOOLS

ROW = Row('stage 0 as it was', method='stage_0')
_FOLDER = 'unchanged'


def representatives(records: Iterable[Record]) -> dict[tuple[Path, int], Record]:
    """The first finished run of several stages for each stage 0: by its snapshot and the number of all classes."""
    found: dict[tuple[Path, int], Record] = {}
    for record in records:
        if record.asked.num_stages > 1 and not record.conflict() and record.results() is not None:
            found.setdefault(_start(record), record)
    return found


def _start(record: Record) -> tuple[Path, int]:
    return record.base() or record.folder / 'stage_0/snapshot.pth', record.asked.num_classes


def measure(records: Iterable[Record], threads: int | None) -> Iterator[str]:
    """Evaluates each stage 0 that was not yet, in processes of their own; says what it does and what fails.

    Args:
        records: the runs of a table.
        threads: of a process; by default all cores.
    """
    for record in representatives(records).values():
        out = record.folder / _FOLDER
        if _read(record) is not None:
            continue
        yield f'{record.run.name}: evaluating stage 0 as it was'
        out.mkdir(exist_ok=True)
        command = [sys.executable, str(TOOLS / 'test_incremental.py'), str(record.folder), '--unchanged']
        with (out / 'log.txt').open('wb') as log:
            code = subprocess.run(
                [*command, '--out', str(out)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
                env=os.environ | dict(OMP_NUM_THREADS=str(threads or os.cpu_count() or 1)),
            ).returncode  # fmt: skip
        if code:
            yield f'{record.run.name}: stage 0 as it was could not be evaluated, see {out / "log.txt"}'


def _read(record: Record) -> dict[str, Any] | None:
    path = record.folder / _FOLDER / 'unchanged.json'
    return json.loads(path.read_text())[0] if path.exists() else None


def with_unchanged(lines: Sequence[Line], records: Mapping[str, Record]) -> list[Line]:
    """The lines; before each section those of stage 0 that its first runs of several stages start from."""
    chosen = representatives(records.values())
    found: list[Line] = []
    for _, group in groupby(lines, section_of):
        section = list(group)
        of_stages = [line for line in section if any(records[name].asked.num_stages > 1 for name in line.figures)]
        if of_stages:
            starts = dict.fromkeys(_start(records[name]) for name in of_stages[0].figures)
            line = _line(of_stages[0].cell, [chosen[start] for start in starts])
            found += [line] if line.figures else []
        found += section
    return found


def _line(cell: Cell, runs: Sequence[Record]) -> Line:
    line = Line(Cell(cell.part, ROW, cell.protocol, 0, tuple(record.run for record in runs)))
    for record in runs:
        results = _read(record)
        if results is not None:
            line.add(record.run.name, results, dict(results['mIoU'], hIoU=results['hIoU']))
    return line
