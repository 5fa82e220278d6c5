# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Several processes do what one does: losses, batches, thresholds, memory, tables; and they end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmseg_sats.engine.training import distributed
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

ROOT = Path(__file__).parents[1]
MINUTE = 60
CONFIG = """
_base_ = ['{root}/configs/sats/segformer_tiny_shapes_3-1_m.py']
custom_imports = dict(imports=['mmseg_sats', 'tests.in_double'])
method = 'sats'
data_root = '{data_root}'
protocol = '3-3'
memory = 7
image_size = 48
crop_size = 40
train_images = 25
val_images = 13
batch_size = {batch_size}
epochs = 2
report = None
rehearsal = None
norm_cfg = dict(_delete_=True, type='GN', num_groups=8)
model = dict(
    backbone=dict(embed_dims=8),
    decode_head=dict(dropout_ratio=0.0, channels=16, in_channels=[8, 16, 32, 64]))
custom_hooks = [
    dict(type=name) for name in ('PseudoLabelThresholdHook', 'PrototypeHook', 'ProgressHook', 'Tell', 'Interfere')]
"""


@pytest.fixture(scope='module')
def config(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Maker of the config of a process that has so many images in a batch."""
    folder = tmp_path_factory.mktemp('config')

    def make(batch_size: int) -> Path:
        path = folder / f'batch_of_{batch_size}.py'
        text = CONFIG.format(root=ROOT, data_root=shapes_root, batch_size=batch_size)
        path.write_text(text)
        return path

    return make


def free_port() -> str:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return str(found.getsockname()[1])


def start(config: Path, work_dir: Path, *words: str, processes: int = 2, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    more = dict(PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.Popen(
        ['bash', 'tools/dist_train.sh', str(config), str(processes), '--work-dir', str(work_dir), *words],
        cwd=ROOT,
        env=os.environ | more | {'PORT': free_port()} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen) -> str:
    return process.communicate(timeout=500)[0]


def run(config: Path, work_dir: Path, *words: str, **environment: str) -> str:
    """What two processes print that end well."""
    process = start(config, work_dir, *words, **environment)
    output = output_of(process)
    assert process.returncode == 0, output[-5000:]
    return output


@pytest.fixture(scope='module')
def one(config: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work dir of one process with batches of four."""
    work_dir = tmp_path_factory.mktemp('one') / 'run'
    before = torch.get_default_dtype()
    try:
        cfg = Config.fromfile(config(4))
        torch.set_default_dtype(torch.float64)
        cfg.work_dir = str(work_dir)
        RUNNERS.build(cfg).train()
    finally:
        torch.set_default_dtype(before)
    return work_dir


@pytest.fixture(scope='module')
def two(config: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The work dir of two processes with batches of two, and what they printed before and after they were resumed.

    SIGTERM reaches the second one in the middle of the second epoch of stage 1.
    """
    work_dir = tmp_path_factory.mktemp('two') / 'run'
    process = start(config(2), work_dir, STOP_AT='1:11:1')
    stopped = output_of(process)
    assert process.returncode != 0
    return work_dir, stopped, run(config(2), work_dir, '--resume')


def read(work_dir: Path, stage: int, name: str) -> list:
    """What each iteration of a stage left, of all the times that it was resumed."""
    paths = sorted((work_dir / f'stage_{stage}').glob(f'{name}_from_*.json'), key=lambda path: len(path.stem))
    return [item for path in paths for item in json.loads(path.read_text())]


@pytest.mark.parametrize('stage', [0, 1])
def test_two_processes_have_the_losses_of_one(stage: int, one: Path, two: tuple[Path, str, str]) -> None:
    """In double precision, with SATS-M, although the two were stopped and resumed."""
    alone, together = (read(work_dir, stage, 'losses') for work_dir in (one, two[0]))
    assert len(alone) == len(together) >= 10
    names = {'loss', 'decode.loss_ce'} | ({'loss_attention', 'loss_output'} if stage else set())
    assert names == {name for name in alone[0] if 'loss' in name}
    for expected, got in zip(alone, together, strict=True):
        assert {name: got[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, abs=1e-5
        )


@pytest.mark.parametrize(('stage', 'last'), [(0, (2, 1)), (1, (1, 1))])
def test_two_processes_see_the_images_of_one(
    stage: int, last: tuple[int, int], one: Path, two: tuple[Path, str]
) -> None:
    """The same ones with the same crops and flips in every iteration, each once."""
    alone = read(one, stage, 'images_0')
    shares = [read(two[0], stage, f'images_{rank}') for rank in (0, 1)]
    for whole, first, second in zip(alone, *shares, strict=True):
        assert sorted(first + second) == sorted(whole)
    assert (len(shares[0][-1]), len(shares[1][-1])) == last  # 19 images, by 4 and (with replay) by 2


def test_the_first_process_draws_the_numbers_of_one_and_the_second_others(
    one: Path, two: tuple[Path, str, str]
) -> None:
    alone = read(one, 1, 'draws_0')
    first, second = (read(two[0], 1, f'draws_{rank}') for rank in (0, 1))
    assert first == alone
    assert len({*first, *second}) == 2 * len(alone)


def test_two_processes_find_the_thresholds_memory_and_tables_of_one(one: Path, two: tuple[Path, str, str]) -> None:
    for name in ('stage_0/exemplars.json', 'stage_1/exemplars.json', 'stage_1/pseudo_label_thresholds.json'):
        assert (one / name).read_text() == (two[0] / name).read_text()
    alone, together = (json.loads((work_dir / 'results.json').read_text()) for work_dir in (one, two[0]))
    assert alone == together  # over 13 images, of which one process sees the odd one
    assert (one / 'results.csv').read_text() == (two[0] / 'results.csv').read_text()


def test_one_process_writes(two: tuple[Path, str, str]) -> None:
    lines = re.findall(r'^WRITTEN (.*)$', two[1] + two[2], re.M)
    # Of the run that is stopped, torchrun may end the second process while it says so.
    assert re.search(r'^WRITTEN ', two[2], re.M)
    left = [path for line in lines for path in json.loads(line) if not re.search('/(images|draws)_1_from_', path)]
    left = [path for path in left if not path.startswith(('/dev/', '/proc/'))]
    # mmengine reads a config through a temporary copy, in every process.
    assert [path for path in left if Path(path).exists()] == []
    assert two[2].count('learned in stage') == 1


def test_a_failing_process_ends_the_other_with_its_error_on_top(
    config: Callable[[int], Path], tmp_path: Path
) -> None:
    process = start(config(2), tmp_path / 'run', FAIL_AT='0:2:1')
    output = output_of(process)
    ended = time.time()
    assert process.returncode != 0
    said = output.split('FAILED AT ')[1]
    assert ended - float(said.split('\n')[0]) < MINUTE
    own = r'process 1 of 2 \(on [^)]*\) failed: ValueError: the dog ate the batch'
    errors = re.findall(r'^(?:\[rank\d\]: )?(?:process .*|\w*Error: .*)$', said, re.M)
    assert re.fullmatch(own, errors[0])
    assert errors[1:] == ['[rank1]: ValueError: the dog ate the batch']  # its traceback; the other is quiet
    cause = said.split('Root Cause')[1]
    assert 'ValueError: the dog ate the batch' in cause
    assert re.search(r'rank +: 1 ', cause)


def same_files(work_dir: Path, other: Path) -> None:
    for name in ('results.json', 'stage_0/exemplars.json', 'stage_1/exemplars.json'):
        assert (work_dir / name).read_bytes() == (other / name).read_bytes()
    one, two = (load_checkpoint_safely(path / 'stage_1/snapshot.pth')['state_dict'] for path in (work_dir, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sigterm_stops_two_processes_behind_a_checkpoint(two: tuple[Path, str, str]) -> None:
    work_dir, stopped, resumed = two
    assert 'stopped by SIGTERM behind iteration 12: go on with --resume' in stopped
    assert 'exitcode  : 143' in stopped
    assert 'stage_1/iter_12.pth' in resumed
    sizes = [len(json.loads(path.read_text())) for path in sorted(work_dir.glob('stage_1/losses_from_*.json'))]
    assert sizes == [12, len(read(work_dir, 1, 'losses')) - 12]


def test_a_work_dir_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second process sees it, whose machine has another folder of that name."""
    monkeypatch.setattr(distributed, 'is_distributed', lambda: True)
    monkeypatch.setattr(distributed, 'is_main_process', lambda: False)
    monkeypatch.setattr(distributed, 'get_dist_info', lambda: (1, 2))
    with pytest.raises(FileNotFoundError, match=r'work dir .* of process 1 of 2 .* a folder that all machines share'):
        distributed.check_shared(tmp_path)
    monkeypatch.setattr(distributed, 'is_main_process', lambda: True)
    distributed.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


SLURM = {
    # Runs the job's script as slurm would, from a copy of it.
    'sbatch': """
        echo "sbatch $*" >> "$LOG"
        for word; do case $word in
            --export=*) export "${word#--export=ALL,}"; shift ;;
            --*) shift ;;
            *) break ;;
        esac; done
        cp "$1" "$LOG.copy.sh"; shift
        SLURM_JOB_ID=20007 bash "$LOG.copy.sh" "$@" """,
    'srun': 'echo "srun $MASTER_PORT $*" >> "$LOG"; if [ -n "$CANCEL" ]; then kill -TERM $PPID; fi; exit $CODE',
    'scontrol': 'echo "scontrol $*" >> "$LOG"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs ``tools/slurm_train.sh`` on a cluster of stand-ins; gives its exit code and what was called."""
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{body}\n')
        (tmp_path / name).chmod(0o755)

    def call(*words: str, **environment: str) -> tuple[int, list[str]]:
        log = tmp_path / 'log'
        log.write_text('')
        own = {key: value for key, value in os.environ.items() if key not in ('MASTER_PORT', 'GPUS')}
        more = dict(PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}', LOG=str(log), CODE='0', CANCEL='')
        command = ['bash', str(ROOT / 'tools/slurm_train.sh'), *words]
        result = subprocess.run(
            command, cwd=tmp_path, env=own | more | environment, capture_output=True, text=True, check=False
        )
        return result.returncode, log.read_text().splitlines()

    return call


def test_a_machine_without_slurm_is_told_so(tmp_path: Path) -> None:
    command = [shutil.which('bash'), str(ROOT / 'tools/slurm_train.sh'), 'gpu', 'job', 'a.py']
    result = subprocess.run(command, env=dict(PATH=str(tmp_path)), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'there is no sbatch here' in result.stderr


def test_a_slurm_job(slurm: Callable[..., tuple[int, list[str]]]) -> None:
    code, (submitted, started) = slurm('gpu', 'my job', 'a.py', '--cfg-options', 'a=b c', GPUS='16', GPUS_PER_NODE='8')
    assert code == 0
    for words in ('--partition=gpu', '--job-name=my job', '--ntasks=16 --ntasks-per-node=8', '--gres=gpu:8',
                  '--requeue', '--open-mode=append', '--signal=TERM@180'):  # fmt: skip
        assert f' {words} ' in submitted
    assert started.startswith('srun 20007 ')
    assert '--kill-on-bad-exit=1' in started
    train = f'python -u {ROOT}/tools/train_incremental.py a.py --cfg-options a=b c --launcher slurm'
    assert started.endswith(train)


@pytest.mark.parametrize(
    ('environment', 'code', 'requeued'),
    [
        (dict(CODE='143'), 143, True),  # told to stop before the time limit
        (dict(CODE='143', CANCEL='1'), 143, False),  # scancel: the script is told as well
        (dict(CODE='1'), 1, False),  # an error
    ],
)
def test_a_slurm_job_requeues_what_was_stopped(
    environment: dict[str, str], code: int, requeued: bool, slurm: Callable[..., tuple[int, list[str]]]
) -> None:
    returned, calls = slurm('gpu', 'job', 'a.py', **environment)
    assert returned == code
    assert [call for call in calls if call.startswith('scontrol')] == ['scontrol requeue 20007'] * requeued
    assert '--resume' not in calls[1]
    assert slurm('gpu', 'job', 'a.py', SLURM_RESTART_COUNT='1')[1][1].endswith('--launcher slurm --resume')


@pytest.mark.slow
def test_a_killed_process_ends_the_other(config: Callable[[int], Path], tmp_path: Path) -> None:
    process = start(config(2), tmp_path / 'run', KILL_AT='0:2:1')
    output = output_of(process)
    ended = time.time()
    assert process.returncode != 0
    said = output.split('FAILED AT ')[1]
    assert ended - float(said.split('\n')[0]) < MINUTE
    cause = said.split('Root Cause')[1]
    assert re.search(r'rank +: 1 ', cause)
    assert 'Signal 9 (SIGKILL)' in cause
    assert not re.search(r'^process', said, re.M)


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_and_resumes_too(
    config: Callable[[int], Path], two: tuple[Path, str, str], tmp_path: Path
) -> None:
    """As a cluster does it that knows of the first process alone."""
    process = start(config(2), tmp_path / 'run')
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'Epoch(train) [1][' in line:
            child = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True, check=True)
            os.kill(int(child.stdout.split()[0]), signal.SIGTERM)
            break
    output = ''.join(lines) + output_of(process)
    assert process.returncode != 0
    assert 'go on with --resume' in output
    assert list((tmp_path / 'run').glob('stage_0/iter_*.pth'))
    run(config(2), tmp_path / 'run', '--resume')
    same_files(tmp_path / 'run', two[0])


@pytest.mark.slow
def test_two_machines(config: Callable[[int], Path], two: tuple[Path, str, str], tmp_path: Path) -> None:
    """As docs/distributed.md has it, both machines being this one; a failure on one ends the other."""
    for fail_at, work_dir in (('', tmp_path / 'run'), ('0:2:1', tmp_path / 'failed')):
        words = dict(NNODES='2', PORT=free_port(), FAIL_AT=fail_at)
        nodes = [
            start(config(2), work_dir, processes=1, NODE_RANK=str(rank), **words) for rank in (0, 1)
        ]
        outputs = [output_of(node) for node in nodes]
        ended = time.time()
        if fail_at:
            assert all(node.returncode != 0 for node in nodes)
            failed_at = float(outputs[1].split('FAILED AT ')[1].split('\n')[0])
            assert ended - failed_at < MINUTE
            assert 'process 0 of 2' in outputs[0]
            assert 'ends, for another process of the run has ended' in outputs[0]
        else:
            assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
            same_files(work_dir, two[0])
