# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The suite on other versions of Python, torch, mmengine, mmcv, mmseg and numpy: ``make test-stacks``.

Each cell of the table gets a venv of its own in ``.stacks/``, which is kept. Run with ``--quick`` it takes one to
three minutes a cell once the venvs are there. Nothing but Python's own library is imported here, so that a bare
Python can start it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / '.stacks'
MMCV_WHEELS = 'MMCV_WHEELS'
"""Variable of the environment: the folder of a wheel of mmcv 2.1.0 that has its compiled ops."""


class Cell(NamedTuple):
    """One row of the table of docs/install.md."""

    python: str
    torch: str
    stack: str
    """``forks``: the onedl ones, at the versions of constraints.txt; ``openmmlab``: OpenMMLab's own last releases."""
    numpy: str
    in_ci: bool = True

    @property
    def name(self) -> str:
        """What the cell is called on the command line and on disk."""
        return f'py{self.python}-torch{self.torch}-{self.stack}-numpy{self.numpy}'


CELLS = (
    Cell('3.11', '2.13.0', 'forks', '2'),  # what `make venv` installs
    Cell('3.10', '2.4.1', 'openmmlab', '1.26', in_ci=False),  # mmcv's ops build for half an hour
    Cell('3.10', '2.4.1', 'forks', '2'),
    Cell('3.11', '2.14.1', 'forks', '2'),
    Cell('3.12', '2.14.1', 'forks', '2'),
    Cell('3.13', '2.14.1', 'forks', '2'),
)
OPENMMLAB = ('mmengine==0.10.7', 'mmsegmentation==1.2.2')
MMCV = 'mmcv==2.1.0'
QUICK = (
    'attention', 'attention_mit', 'checkpoint', 'class_objects', 'crp_loss', 'hostile_files', 'incremental_runner',
    'packaging', 'prototypes', 'segmentor', 'surroundings', 'unbiased',
)  # fmt: skip


class CannotBuildError(Exception):
    """A cell that this machine cannot build; the message says why in one line."""


def find_python(version: str) -> str:
    """A Python of this version: the running one, one on PATH, or one of pyenv's.

    Raises:
        CannotBuildError: there is none.
    """
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv')) / 'versions'
    for one in (sys.executable, f'python{version}', *sorted(pyenv.glob(f'{version}.*/bin/python'))):
        found = shutil.which(one)
        if found and _output(found, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])') == version:
            return found
    raise CannotBuildError(f'no Python {version} here')


def constraints(cell: Cell) -> list[str]:
    """What pip is held to in a cell: constraints.txt but for torch, or with an older numpy what fits that."""
    if cell.numpy == '2':
        lines = (ROOT / 'requirements/constraints.txt').read_text().splitlines()
        kept = [line for line in lines if not re.match(r'#|(torch|typing_extensions|setuptools)==', line)]
    else:
        kept = [f'numpy~={cell.numpy}.0', 'opencv-python<4.12']
    return [*kept, f'torch=={cell.torch}', 'setuptools<81']


def build(cell: Cell) -> Path:
    """Makes the cell's venv, unless it is there for the present requirements.

    Returns:
        Its Python.

    Raises:
        CannotBuildError: something cannot be had.
    """
    folder = FOLDER / cell.name
    python, stamp = folder / 'bin/python', folder / 'built'
    asked = ''.join(path.read_text() for path in sorted(ROOT.glob('requirements/*.txt')))
    if stamp.exists() and stamp.read_text() == asked:
        return python
    base = find_python(cell.python)
    shutil.rmtree(folder, ignore_errors=True)
    _run(base, '-m', 'venv', str(folder))
    limits = folder / 'constraints.txt'
    limits.write_text('\n'.join(constraints(cell)) + '\n')
    install = (str(python), '-m', 'pip', '--disable-pip-version-check', 'install', '--no-compile', '-c', str(limits))
    _run(*install, 'torch', 'numpy', 'wheel', '-r', str(ROOT / 'requirements/tests.txt'))
    if cell.stack == 'forks':
        _run(*install, '-r', str(ROOT / 'requirements.txt'))
    else:
        _run(*install, *OPENMMLAB, 'ftfy', 'regex', 'matplotlib', '-r', str(ROOT / 'requirements/runtime.txt'))
        _install_mmcv(install)
    stamp.write_text(asked)
    return python


def _install_mmcv(install: tuple[str, ...]) -> None:
    """mmcv with its ops, which mmseg 1.2.2 imports: a wheel of it, or half an hour of two cores."""
    if wheels := os.environ.get(MMCV_WHEELS):
        _run(*install, '--no-index', '--find-links', wheels, '--no-deps', MMCV)
        return
    print(f'Building {MMCV} with its ops: half an hour. {MMCV_WHEELS}=FOLDER names a wheel instead', flush=True)
    environment = dict(MMCV_WITH_OPS='1', FORCE_CUDA='0', MAX_JOBS='2', CFLAGS='-O0 -g0', CXXFLAGS='-O0 -g0')
    _run(*install, 'ninja', 'psutil')
    _run(*install, '--no-build-isolation', '--no-deps', MMCV, **environment)


def would_replace(python: Path) -> list[str]:
    """What is installed in the venv, and would be installed in another version by ``pip install .``."""
    listed = _run(str(python), '-m', 'pip', 'list', '--format=freeze').splitlines()
    there = {_normal(line.split('==')[0]) for line in listed} - {'mmseg-sats'}
    plan = _run(str(python), '-m', 'pip', 'install', '--dry-run', '--no-build-isolation', str(ROOT))
    new = re.search('^Would install (.*)$', plan, re.MULTILINE)
    return [one for one in (new[1].split() if new else ()) if _normal(one.rpartition('-')[0]) in there]


def _normal(distribution: str) -> str:
    return re.sub('[-_.]+', '-', distribution).lower()


def test(cell: Cell, arguments: list[str]) -> str:
    """Builds a cell and runs pytest in it.

    Returns:
        What it gave, in one line.
    """
    try:
        python = build(cell)
        replaced = would_replace(python)
    except CannotBuildError as error:
        return f'not run: {error}'
    if replaced:
        return f'FAILED: `pip install .` would replace {", ".join(replaced)}'
    start = time.monotonic()
    command = [str(python), '-W', 'ignore', '-m', 'pytest', '-p', 'no:cacheprovider', '-m', 'not slow', *arguments]
    log = FOLDER / f'{cell.name}.txt'
    with log.open('w') as file:
        subprocess.run(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1'), stdout=file,
                       stderr=subprocess.STDOUT, check=False)
    last = [line.strip('= ') for line in log.read_text().splitlines() if line.strip()][-1]
    counts = ', '.join(re.findall(r'\d+ (?:passed|failed|errors?|skipped)', last))
    return f'{counts or last} in {time.monotonic() - start:.0f} s'


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=os.environ | environment, cwd=ROOT)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if 'ERROR' in line] or lines or ['it says nothing']
        raise CannotBuildError(f'{" ".join(command[1:4])}: {errors[-1].strip()}')
    return done.stdout


def _output(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=False).stdout.strip()


def main() -> int:
    """The command."""
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(
        prog='python -m tests.stacks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('cells', nargs='*', metavar='CELL', help=f'some of the cells alone: {", ".join(names)}')
    parser.add_argument('--quick', action='store_true', help='the tests that depend most on the versions alone')
    parser.add_argument('--args', default='-n 2 --dist loadfile', help='more words for pytest (%(default)s)')
    args = parser.parse_args()
    if unknown := set(args.cells) - set(names):
        parser.error(f'no such cell: {", ".join(sorted(unknown))}')
    files = [f'tests/test_{name}.py' for name in QUICK] if args.quick else []
    found = {}
    for cell in (cell for cell in CELLS if not args.cells or cell.name in args.cells):
        found[cell] = test(cell, [*args.args.split(), *files])
        print(f'{cell.name}: {found[cell]}', flush=True)
    print('\n| Python | torch | stack | numpy | what it gave |\n|---|---|---|---|---|')
    for cell, outcome in found.items():
        print(f'| {cell.python} | {cell.torch} | {cell.stack} | {cell.numpy} | {outcome} |')
    return int(any('failed' in one.lower() or 'error' in one for one in found.values()))


if __name__ == '__main__':
    sys.exit(main())
