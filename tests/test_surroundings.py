# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A package that is missing or too old, and Ctrl-C, end in one line; git and a home are not needed."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmseg_sats import commands
from mmseg_sats.utils.oldest_torch import check_torch
from tests.forked import PACKAGE, run_forked

ROOT = Path(__file__).parents[1]
CONFIG = 'sats/segformer_tiny_shapes_3-1'
# Code that makes packages absent.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
"""


def command(folder: Path, *words: str, start: str = '', **environment: str) -> subprocess.Popen:
    """Starts ``mmseg-sats`` in a folder; Python runs the code ``start`` before it."""
    (folder / 'start').mkdir(exist_ok=True)
    (folder / 'start/sitecustomize.py').write_text(start)
    path = os.pathsep.join([str(folder / 'start'), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-m', 'mmseg_sats', *words], cwd=folder, text=True,
        env=os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS='1') | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def small_run(*options: str) -> list[str]:
    return ['train', CONFIG, '--work-dir', 'run', '--cfg-options', 'epochs=1', 'image_size=64', 'crop_size=64',
            'train_images=12', 'val_images=6', 'batch_size=6', 'protocol=3-3', *options]


@pytest.mark.parametrize('version', ['2.4.0', '2.4.1+cu121', '2.13.0+cpu', '3.0', '2.14.0a0+git123'])
def test_a_torch_that_works_passes(version: str) -> None:
    check_torch(version)


@pytest.mark.parametrize('version', ['2.3.1', '2.1.2+cu118', '1.13.1'])
def test_an_older_one_is_named_beside_the_needed_one(version: str) -> None:
    with pytest.raises(ImportError) as raised:
        check_torch(version)
    assert str(raised.value) == f'mmseg_sats needs torch 2.4 or newer, found {version}'


def test_the_command_names_it_in_one_line(tmp_path: Path) -> None:
    wrong = 'import torch\ntorch.__version__ = type(torch.__version__)("2.1.2")\n'
    process = command(tmp_path, 'check', CONFIG, start=wrong)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (1, 'mmseg_sats needs torch 2.4 or newer, found 2.1.2\n')


@pytest.mark.parametrize(
    ('error', 'said'),
    [
        (ModuleNotFoundError('No module', name='torch'), 'torch is not installed: `pip install torch`'),
        (ModuleNotFoundError('No module', name='cv2'), 'cv2 is not installed: `pip install opencv-python`'),
        (ModuleNotFoundError('No module', name='mmseg'), "mmseg is not installed: `pip install 'mmseg_sats[mm]'`"),
        (ModuleNotFoundError('No module', name='mmcv._ext'), 'this mmseg needs an mmcv with compiled ops'),
    ],
)
def test_an_absent_package_is_named(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, said: str
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit, match=re.escape(said)):
        commands._run(argparse.Namespace(run=run))


@pytest.mark.parametrize(
    'error',
    [
        ModuleNotFoundError('No module', name='somebody.module'),
        ImportError('cannot import name', name='mmseg', path='mmseg/__init__.py'),
    ],
)
def test_what_may_be_a_fault_of_code_keeps_its_traceback(error: ImportError) -> None:
    def run(args: argparse.Namespace) -> None:
        raise error

    with pytest.raises(ImportError) as raised:
        commands._run(argparse.Namespace(run=run))
    assert raised.value is error


WITHOUT = {
    'matplotlib': ('report.images=1', 'matplotlib is not installed: `pip install matplotlib`'),
    'tensorboard': ('vis_backends=$tensorboard', 'Please run "pip install future tensorboard" [^\n]*'),
}


def test_a_run_without_a_package_that_it_needs_ends_in_one_line(tmp_path: Path) -> None:
    run = '\nimport sys, mmseg_sats\nsys.exit(mmseg_sats.commands.main({words!r}))'
    options = {package: option for package, (option, _) in WITHOUT.items()}
    scripts = [ABSENT.format(names=(name,)) + run.format(words=small_run(options[name])) for name in options]
    done = run_forked(PACKAGE, scripts, [tmp_path] * len(scripts))
    for one, (_, said) in zip(done, WITHOUT.values(), strict=True):
        assert one.returncode == 1
        assert re.fullmatch(said, one.stderr.strip())
    assert not list(tmp_path.glob('run/stage_0/*.pth'))


def test_ctrl_c_ends_a_run_in_one_line(tmp_path: Path) -> None:
    # Where the suite runs in a shell's background, Ctrl-C is ignored, and its processes inherit that.
    heeded = 'import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n'
    process = command(tmp_path, *small_run('epochs=5000', 'rehearsal=None'), start=heeded)
    until = time.monotonic() + 300
    while not list(tmp_path.glob('run/stage_0/epoch_*.pth')) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, 'interrupted: the same command with --resume goes on\n')


def test_without_git_with_a_read_only_home_in_a_path_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / 'my first run'
    folder.mkdir()
    nowhere = dict(HOME='/proc', XDG_CACHE_HOME='/proc', PATH=str(folder / 'bin'))
    process = command(folder, *small_run('report.images=1', 'report.attention=0'), **nowhere)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert 'Traceback' not in output + errors
    assert (folder / 'run/results.json').exists()
    assert (folder / 'run/report/index.html').exists()
