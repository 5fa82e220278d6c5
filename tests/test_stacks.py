# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The list of stacks is one: tests/stacks.py, docs/install.md, the workflow and the classifiers agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import stacks
from tests.stacks import CELLS, Cell

ROOT = Path(__file__).parents[1]


def rows_of_the_page() -> list[list[str]]:
    text = (ROOT / 'docs/install.md').read_text()
    table = text.partition('| Python | torch | stack | numpy | what it gave |\n')[2].partition('\n\n')[0]
    return [[word.strip() for word in line.strip('|').split('|')] for line in table.splitlines()[1:]]


def test_the_page_has_every_cell_and_what_it_gave() -> None:
    rows = rows_of_the_page()
    assert [tuple(row[:4]) for row in rows] == [cell[:4] for cell in CELLS]
    for row in rows:
        assert re.match(r'\d+ passed|not run: .', row[4]), row


def test_the_workflow_has_the_cells_that_it_can_build() -> None:
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    job = workflow['jobs']['stacks']
    found = [Cell(**row) for row in job['strategy']['matrix']['include']]
    assert found == [cell._replace(in_ci=True) for cell in CELLS if cell.in_ci]
    command = job['steps'][-1]['run']
    for cell in found:
        named = re.sub(r'\$\{\{ matrix\.(\w+) \}\}', lambda match, cell=cell: getattr(cell, match[1]), command)
        assert named == f'python -m tests.stacks --quick "{cell.name}"'


def test_a_python_that_was_run_has_its_classifier() -> None:
    listed = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / 'pyproject.toml').read_text()))
    assert listed == {row[0] for row in rows_of_the_page() if 'passed' in row[4]}


def test_the_first_cell_is_what_make_installs() -> None:
    pins = (ROOT / 'requirements/constraints.txt').read_text().splitlines()
    assert f'torch=={CELLS[0].torch}' in pins
    assert CELLS[0].stack == 'forks'


def test_the_quick_choice_names_files() -> None:
    assert not [name for name in stacks.QUICK if not (ROOT / f'tests/test_{name}.py').is_file()]


@pytest.fixture
def no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, 'FOLDER', tmp_path)


@pytest.mark.usefixtures('no_folder')
def test_a_cell_that_cannot_be_built_says_why() -> None:
    assert stacks.test(Cell('3.99', '2.4.1', 'forks', '2'), []) == 'not run: no Python 3.99 here'


def test_what_pip_would_replace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        'list': 'torch==2.1.2\nnumpy==1.26.4\nopencv-python==4.8.0\n',
        'install': 'Collecting torch\nWould install Jinja2-3.1.6 mmseg_sats-0.1 opencv_python-5.0 torch-2.13.0+cpu\n',
    }
    monkeypatch.setattr(stacks, '_run', lambda *words: said[words[3]])
    assert stacks.would_replace(Path('python')) == ['opencv_python-5.0', 'torch-2.13.0+cpu']


def test_a_bare_python_can_start_it() -> None:
    done = subprocess.run([sys.executable, '-I', '-S', '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
                           'import tests.stacks; sys.exit("torch" in sys.modules)'], check=False)  # fmt: skip
    assert done.returncode == 0
