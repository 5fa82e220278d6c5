# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What is taken to a machine with a GPU and without internet, and the script that measures there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as benchmarks
from benchmarks import bundle, killed_run
from mmseg_sats.utils.installed import find_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'benchmarks/on_gpu.sh'
STEPS = (
    'tests', 'throughput.bf16', 'throughput.fp16', 'ratios.step', 'ratios.crp', 'ratios.backbone',
    'ratios.many_classes', 'ratios.stages', 'train',
)  # fmt: skip
FIRST_CALL, IN_ALL, MOST_FILES = 570, 12 * 60, 8

# In Python's place: it notes its words and where it looks for modules; fails at `crp`, hangs at `backbone`.
STAND_IN = """#!/bin/sh
echo "$PYTHONPATH | $*" >>'{calls}'
case "$*" in
    *'pip install'*) [ ! -e '{broken}' ] ;;
    *torch.cuda*) ;;
    *' crp '*) echo 'a reason'; exit 3 ;;
    *' backbone '*) echo 'before the end'; sleep 600 ;;
    *' step '*)
        printf 'NVIDIA, 1 of 16 threads, torch 2\\n\\nstep: a step\\n| time | measured |\\n|---|---|\\n| 2 | 1 |\\n'
        printf '+---+\\n| a run |\\n+---+\\n| 1 |\\n+---+\\n' ;;
    *) echo 'done' ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> SimpleNamespace:
    """A bundle, a stand-in for Python and a way to call the script: ``call(*steps, **variables)``."""
    (tmp_path / 'bundle/wheels').mkdir(parents=True)
    (tmp_path / 'bundle/wheels/one-1-py3-none-any.whl').touch()
    calls, out, python = tmp_path / 'calls', tmp_path / 'out', tmp_path / 'python'
    python.write_text(STAND_IN.format(calls=calls, broken=tmp_path / 'broken'))
    python.chmod(0o755)

    def call(*steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, 'bundle', 'out', *steps], cwd=tmp_path, text=True, capture_output=True, check=False, timeout=500,
            env=os.environ | dict(PYTHON=str(python)) | variables,
        )  # fmt: skip

    return SimpleNamespace(call=call, calls=calls, out=out, path=tmp_path)


def listed(machine: SimpleNamespace) -> dict[str, tuple[int, list[str]]]:
    """What a dry run prints: each step's limit and command."""
    lines = [line.split() for line in machine.call(DRY='1').stdout.splitlines()]
    return {name: (int(seconds), words) for name, seconds, *words in lines}


def test_the_steps_and_their_time(machine: SimpleNamespace) -> None:
    steps = listed(machine)
    assert tuple(steps) == STEPS
    assert not machine.out.exists()
    seconds = {name: limit for name, (limit, _) in steps.items()}
    assert sum(seconds.values()) <= IN_ALL - 15  # the wheels are installed too
    assert sum(seconds.values()) - seconds['train'] <= FIRST_CALL - 30
    logs = {name.split('.')[0] for name in steps}
    assert len(logs) + len({'summary.txt', 'ratios_cuda.json', 'table.md'}) <= MOST_FILES


def test_the_commands_are_ones_that_there_are(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []
    monkeypatch.setattr(benchmarks, 'run', lambda name, threads, precisions: ran.append((name, precisions)) or [])
    for _, words in listed(machine).values():
        if 'benchmarks' in words:
            assert benchmarks.main(words[words.index('benchmarks') + 1 :]) == 0
        elif 'pytest' in words:
            assert all((ROOT / word).exists() for word in words if word.startswith('tests/'))
        else:
            assert words[:2] == ['-m', 'benchmarks.killed_run']
            assert find_config(words[2].removeprefix('configs/')).exists()
    assert ran == [
        ('throughput', ['bf16']), ('throughput', ['fp16']), ('step', None), ('crp', None), ('backbone', None),
        ('many_classes', None), ('stages', None),
    ]  # fmt: skip


def test_no_step_stops_another_and_what_it_said_is_kept(machine: SimpleNamespace) -> None:
    done = machine.call('ratios.backbone=1', 'tests', 'throughput', 'ratios.step', 'ratios.crp', 'train')
    assert done.returncode == 1
    summary = (machine.out / 'summary.txt').read_text()
    assert done.stdout == summary
    told = [re.sub(r', \d+ s$', '', line) for line in summary.splitlines()]
    assert told == [
        'tests: passed', 'throughput.bf16: passed', 'throughput.fp16: passed', 'ratios.step: passed',
        'ratios.crp: failed (3)', 'ratios.backbone: cut at 1 s', 'train: passed',
    ]  # fmt: skip
    ratios = (machine.out / 'ratios.log').read_text()
    assert 'a reason' in ratios
    assert 'before the end' in ratios
    assert (machine.out / 'throughput.log').read_text().count('done') == 2
    assert {path.name for path in machine.out.iterdir()} == {
        'tests.log', 'throughput.log', 'ratios.log', 'train.log', 'summary.txt', 'table.md', 'ratios_cuda.json',
    }  # fmt: skip
    table = (machine.out / 'table.md').read_text()
    under = '### ratios.step\n\nNVIDIA, 1 of 16 threads, torch 2\n\n'
    assert f'{under}| time | measured |\n|---|---|\n| 2 | 1 |\n' in table
    assert 'a run' not in table
    assert json.loads((machine.out / 'ratios_cuda.json').read_text()).keys() >= {'step', 'throughput'}


def test_the_wheels_go_into_a_folder_of_their_own(machine: SimpleNamespace) -> None:
    assert machine.call('tests').returncode == 0
    install, _, step = machine.calls.read_text().splitlines()
    target = re.search(r'--target (\S+) (\S+)', install)
    assert target[2] == str(machine.path / 'bundle/wheels/one-1-py3-none-any.whl')
    assert step.split(' | ')[0] == f'{target[1]}:{ROOT}'
    assert not Path(target[1]).parent.exists()
    (machine.path / 'broken').touch()
    broken = machine.call('tests')
    assert broken.returncode == 1
    assert 'start: failed' in broken.stdout


def test_a_step_that_no_longer_fits_is_left_for_the_next_call(machine: SimpleNamespace) -> None:
    done = machine.call('tests', 'train', TOTAL='100')
    assert done.returncode == 0
    assert re.search(r'^train: not begun, \d+ s left of 100 and its limit is 170 s$', done.stdout, re.M)
    assert not (machine.out / 'train.log').exists()


@pytest.mark.parametrize('step', ['crp', 'tests=', 'tests=soon'])
def test_a_step_that_there_is_not_is_refused(machine: SimpleNamespace, step: str) -> None:
    done = machine.call(step)
    assert done.returncode == 2
    assert f'{step}: expected STEP or STEP=SECONDS, of tests throughput.bf16' in done.stderr
    assert not machine.calls.exists()


# --- the run that is killed ---

RUN = """
import json, sys, time
from pathlib import Path
work = Path(sys.argv[sys.argv.index('--work-dir') + 1])
def write(name, **content):
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    (work / name).write_text(json.dumps(content))
means = dict(base=20.04, new=None, all=20.04)
if '--resume' not in sys.argv or 'again' in sys.argv:
    write('stage_0/metrics.json', train_seconds=2.5, results=dict(mIoU=means))
if '--resume' not in sys.argv and 'short' not in sys.argv:
    write('stage_1/epoch_1.pth')
    time.sleep(60)
write('stage_1/metrics.json', train_seconds=1, results=dict(mIoU=dict(means, new=3)))
write('results.json', final=dict(base=10, new=3, all=9))
sys.exit('fail' in sys.argv and '--resume' in sys.argv)
"""


@pytest.mark.parametrize(
    ('word', 'told'),
    [('', '| 0, training | 2.5 | 20.0 | - | 20.0 |\n| 1, training | 1.0 | 20.0 | 3.0 | 20.0 |\n| all, with'),
     ('short', 'ended before it could be killed'), ('again', 'trained stage 0 again'), ('fail', 'run failed (1)')],
)  # fmt: skip
def test_a_run_is_killed_and_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], word: str, told: str
) -> None:
    monkeypatch.setattr(killed_run, 'TRAIN', (sys.executable, '-c', RUN))
    assert killed_run.main(['config', '--work-dir', str(tmp_path / 'run'), '--cfg-options', word]) == bool(word)
    printed = capfd.readouterr().out
    assert told in printed
    assert ('with stage_1/epoch_1.pth' in printed) == (word != 'short')


@pytest.mark.slow
def test_a_real_run_is_killed_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = 'protocol=3-3 epochs=2 image_size=64 crop_size=64 train_images=24 val_images=8 batch_size=4 report=None'
    words = ('sats/segformer_tiny_shapes_3-1', '--work-dir', str(tmp_path / 'run'), '--cfg-options', *small.split())
    assert killed_run.main(words) == 0
    printed = capfd.readouterr().out
    assert re.search(r'resumed epoch: 1.*\| all, with evaluation( \| [\d.]+){4} \|', printed, re.S)


# --- the bundle ---


@pytest.fixture
def voc_mini(tmp_path: Path) -> Path:
    """Sixty photographs for training and ten to evaluate: nearly all of class 15, the last two of 7 and 3."""
    folder = tmp_path / 'voc_mini'
    for name in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (folder / name).mkdir(parents=True)
    for split, number in (('train', 60), ('val', 10)):
        names = [f'{split}_{index:02}' for index in range(number)]
        for index, name in enumerate(names):
            mask = np.array([[0, 255, 15 if index < number - 2 else (7, 3)[index - number]]], dtype=np.uint8)
            Image.fromarray(mask).save(folder / f'SegmentationClass/{name}.png')
            (folder / f'JPEGImages/{name}.jpg').write_text(name)
        (folder / f'ImageSets/Segmentation/{split}.txt').write_text('\n'.join(names))
    (tmp_path / 'mit_b0.pth').write_text('weights')
    return folder


@pytest.fixture
def made_wheels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the wheels that a stand-in for pip leaves."""
    names = ['addict-2.4.0-py3-none-any.whl', 'wcwidth-1-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl']

    def pip(command: list[str], check: bool) -> None:
        assert check
        assert command[1:5] == ['-m', 'pip', '--disable-pip-version-check', 'wheel']
        assert set(bundle.WHEELS) < set(command)
        folder = Path(command[command.index('-w') + 1])
        folder.mkdir()
        for name in names:
            (folder / name).touch()

    monkeypatch.setattr(bundle.subprocess, 'run', pip)
    return names


def make(voc_mini: Path, *words: str) -> Path:
    out = voc_mini.parent / 'made'
    weights = voc_mini.parent / 'mit_b0.pth'
    bundle.main(['--voc-mini', str(voc_mini), '--mit-b0', str(weights), '--out', str(out), *words])
    return out


def test_every_class_is_in_the_bundle(
    voc_mini: Path, made_wheels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = make(voc_mini, '--train', '5', '--val', '3')
    assert f'{out}: 0.0 MiB (mit_b0.pth 0.0, voc_mini 0.0, wheels 0.0)' in capsys.readouterr().out
    assert {path.name for path in (out / 'wheels').iterdir()} == set(made_wheels)
    assert (out / 'mit_b0.pth').read_text() == 'weights'
    lists = out / 'voc_mini/ImageSets/Segmentation'
    train, val = ((lists / f'{split}.txt').read_text().split() for split in ('train', 'val'))
    assert train == ['train_00', 'train_01', 'train_02', 'train_58', 'train_59']
    assert val == ['val_00', 'val_08', 'val_09']
    for folder, ending in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
        found = {path.name for path in (out / 'voc_mini' / folder).iterdir()}
        assert found == {f'{name}.{ending}' for name in train + val}


@pytest.mark.parametrize(
    ('words', 'told'),
    [
        (['--val', '2'], '2 images, expected at least one for each of the 3 classes'),
        (['--voc-mini', 'nowhere'], r'nowhere does not exist: name it by --voc-mini or \$VOC_MINI'),
        (['--mit-b0', 'nowhere'], r'nowhere does not exist: name it by --mit-b0 or \$MIT_B0'),
        (['--out', '.'], 'exists, expected a new folder'),
    ],
)
def test_what_cannot_be_bundled_is_refused(
    voc_mini: Path, made_wheels: list[str], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        make(voc_mini, *words)
    assert re.search(told, capsys.readouterr().err)
    assert not (voc_mini.parent / 'made').exists()


def test_a_wheel_of_this_machine_alone_is_refused(
    voc_mini: Path, made_wheels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made_wheels.append('mmcv-2-cp311-cp311-linux_x86_64.whl')
    with pytest.raises(SystemExit):
        make(voc_mini)
    assert 'mmcv-2-cp311-cp311-linux_x86_64.whl: expected wheels for any Python 3' in capsys.readouterr().err


def test_a_bundle_that_is_too_heavy_is_refused(
    voc_mini: Path, made_wheels: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, 'LIMIT_MIB', 6e-6)
    with pytest.raises(SystemExit):
        make(voc_mini)
    assert 'take fewer images' in capsys.readouterr().err
    assert not (voc_mini.parent / 'made').exists()
