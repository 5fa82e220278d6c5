# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs side by side: a stand-in trains in no time and leaves what a run leaves."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from rich.console import Console

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.engine.experiments import scheduler as scheduler_module
from mmseg_sats.engine.experiments.plan import make_plan
from mmseg_sats.engine.experiments.record import Record
from mmseg_sats.engine.experiments.scheduler import Scheduler
from mmseg_sats.engine.experiments.tables import TABLES
from mmseg_sats.engine.files.lock import FileLock

ROOT = Path(__file__).parents[1]

# What IncrementalRunner does, without the training. The files `fail`, `hang` and `deaf` (to SIGTERM) name
# runs that are so, and `go` ends the hanging.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv
folder = Path(words[words.index('--work-dir') + 1])
base = words[words.index('--base') + 1] if '--base' in words else None
here = Path(__file__).parent
def asked(name):
    return (here / name).exists() and folder.name in (here / name).read_text().split()
(folder / 'called').write_text(json.dumps(dict(words=words, threads=os.environ['OMP_NUM_THREADS'])))
text = (here / f'{folder.name}.py').read_text()
(folder / 'config.py').write_text(text + f'\\nbase = {base!r}\\n')
print('epoch 1')
if asked('deaf'):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if asked('fail'):
    sys.exit('ValueError: no such thing')
stages = 1 if folder.name.startswith('joint') else 2
for stage in range(stages):
    path = folder / f'stage_{stage}'
    path.mkdir(exist_ok=True)
    (path / 'snapshot.pth').write_text(base or folder.name)
    (path / 'metrics.json').write_text('{"train_seconds": 1.5, "results": {"images": 3}}')
    (path / 'done').write_text(str(time.time()))
    while asked('hang') and not (here / 'go').exists():
        time.sleep(0.05)
means = dict(base=1.0, new=2.0, all=3.0, hIoU=4.0)
(folder / 'results.json').write_text(json.dumps(dict(
    stages=list(range(stages)), final=means, average_all=5.0, forgetting=6.0)))
"""


class Bench:
    """A work dir of a table, and the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / 'out'
        self.script = folder / 'train.py'
        self.script.write_text(STAND_IN)
        self.told = io.StringIO()

    def records(self, systems: str = 'sats,finetune', *words: str, seeds: tuple[int, ...] = (0,)) -> list[Record]:
        plan = make_plan(
            TABLES['table1'], 'shapes', ROOT / 'configs', systems=systems.split(','), seeds=seeds,
            options=['num_shapes=4', *words],
        )  # fmt: skip
        for run in plan.runs:
            self.script.with_name(f'{run.name}.py').write_text(run.load().pretty_text)
        return [Record(self.out, run) for run in plan.runs]

    def train(self, records: list[Record], **options: object) -> list[str]:
        console = Console(file=self.told, width=80)
        return Scheduler(records, self.script, console, poll=0.05, **options).run()

    def base(self, name: str) -> str | None:
        return Config.fromfile(self.out / name / 'config.py').base


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(0.02)


def test_runs_share_stage_0_and_finish(bench: Bench) -> None:
    records = bench.records('sats,finetune,joint', seeds=(0, 1))
    assert bench.train(records, jobs=3, threads=5) == []
    own = bench.out / 'sats_3-1_seed0/stage_0/snapshot.pth'
    assert bench.base('sats_3-1_seed0') is None
    for name in ('sats_3-1_seed1', 'finetune_3-1_seed0', 'finetune_3-1_seed1'):
        assert bench.base(name) == str(own)
        began = (bench.out / name / 'stage_0/done').read_text()
        assert float(began) >= float(own.with_name('done').read_text())
    assert bench.base('joint_3-1_seed0') is bench.base('joint_3-1_seed1') is None
    called = json.loads((bench.out / 'finetune_3-1_seed1/called').read_text())
    assert called['threads'] == '5'
    assert '--resume' in called['words']
    assert called['words'][-4:] == ['--cfg-options', 'num_shapes=4', 'seed=1', 'memory=0']
    # A log: whole lines, however long, one for each thing that happens.
    told = bench.told.getvalue()
    assert 'finetune_3-1_seed0: started at stage 0 of 2, stage 0 from sats_3-1_seed0\n' in told
    assert told.count('finished after') == 6
    assert not any(record.conflict() for record in bench.records('sats,finetune,joint', seeds=(0, 1)))


def test_a_failed_run_is_named_with_its_log_and_the_others_go_on(bench: Bench) -> None:
    bench.script.with_name('fail').write_text('sats_3-1_seed0')
    log = bench.out / 'sats_3-1_seed0/log.txt'
    log.parent.mkdir(parents=True)
    log.write_text('what an earlier start said\n')
    assert bench.train(bench.records()) == ['sats_3-1_seed0']
    told = bench.told.getvalue()
    assert f'sats_3-1_seed0: failed (exit status 1) after 0.0 min; the end of {log}:' in told
    assert '    epoch 1\n    ValueError: no such thing\n' in told
    assert 'an earlier start' not in told
    assert bench.base('finetune_3-1_seed0') is None  # it trained the stage 0 itself
    assert 'finetune_3-1_seed0: finished' in told


def test_a_terminal_gets_a_line_that_is_kept_up_to_date(bench: Bench) -> None:
    console = Console(file=bench.told, width=200, force_terminal=True)
    assert Scheduler(bench.records(), bench.script, console, poll=0.05).run() == []
    told = bench.told.getvalue()
    # Which moments the line shows, the machine decides.
    assert re.search(r'(sats|finetune)_3-1_seed0 \(stage \d of 2\); \d waiting', told)
    assert '1 of 2 stages' not in told  # that is for logs


def test_a_lock_left_behind_is_no_lock(bench: Bench) -> None:
    records = bench.records('sats')
    lock = records[0].folder / 'run.lock'
    lock.parent.mkdir(parents=True)
    lock.write_text(f'process {os.getpid()} on this machine')
    assert bench.train(records) == []
    assert records[0].results() is not None


def test_a_run_of_another_process_is_waited_for_and_not_trained_twice(bench: Bench) -> None:
    (record,) = bench.records('sats')
    holder = FileLock(record.folder / 'run.lock')
    assert holder.acquire()
    assert not FileLock(record.folder / 'run.lock').acquire()

    def finish_elsewhere() -> None:
        wait_for(lambda: 'waited for' in bench.told.getvalue())
        subprocess.run(
            [sys.executable, bench.script, '--work-dir', record.folder], check=True,
            env=os.environ | dict(OMP_NUM_THREADS='elsewhere'),
        )  # fmt: skip
        holder.release()

    thread = threading.Thread(target=finish_elsewhere)
    thread.start()
    assert bench.train([record]) == []
    thread.join()
    assert json.loads((record.folder / 'called').read_text())['threads'] == 'elsewhere'
    assert f'trained by process {os.getpid()} on ' in bench.told.getvalue()
    assert 'finished by another process' in bench.told.getvalue()


def test_a_lock_outlives_its_starter_in_the_child(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / 'run.lock')
    assert lock.acquire()
    child = subprocess.Popen(['sleep', '60'], pass_fds=[lock.descriptor])
    os.close(lock.descriptor)  # as when the starter is killed
    assert not FileLock(tmp_path / 'run.lock').acquire()
    child.kill()
    child.wait()
    assert FileLock(tmp_path / 'run.lock').acquire()


def test_one_stage_0_between_two_processes(bench: Bench) -> None:
    """Another process trains a stage 0 for us: its run holds the stage's lock until that is done."""
    sats, finetune = bench.records()
    bench.script.with_name('hang').write_text('sats_3-1_seed0')
    scheduler = Scheduler([sats], bench.script, Console(file=io.StringIO()), poll=0.05)
    other = Scheduler([finetune], bench.script, Console(file=bench.told), poll=0.05)
    scheduler._start_ready()
    other._start_ready()
    if not (sats.folder / 'stage_0/done').exists():
        assert other.waiting == [finetune]
        assert other.running == []
    wait_for(lambda: (sats.folder / 'stage_0/done').exists())
    assert other.run() == []  # although the other run goes on
    assert bench.base('finetune_3-1_seed0') == str(sats.folder / 'stage_0/snapshot.pth')
    assert sats.results() is None
    bench.script.with_name('go').touch()
    assert scheduler.run() == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_children(bench: Bench, number: signal.Signals) -> None:
    records = bench.records('sats,joint')
    bench.script.with_name('hang').write_text('sats_3-1_seed0 joint_3-1_seed0')

    def interrupt() -> None:
        wait_for(lambda: all((record.folder / 'stage_0/done').exists() for record in records))
        os.kill(os.getpid(), number)

    # A shell starts what runs in the background deaf to Ctrl-C, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    scheduler = Scheduler(records, bench.script, Console(file=bench.told), jobs=2, poll=0.05)
    processes = []
    spawn = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, 'Popen', lambda *a, **k: processes.append(spawn(*a, **k)) or processes[-1])
        with pytest.raises(KeyboardInterrupt):
            scheduler.run()
    signal.signal(signal.SIGINT, before)
    thread.join()
    assert len(processes) == 2
    assert all(process.returncode == -signal.SIGTERM for process in processes)
    # And the same again goes on.
    bench.script.with_name('go').touch()
    assert bench.train(bench.records('sats,joint')) == []


def test_a_child_that_does_not_stop_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = bench.records('sats')
    for name in ('hang', 'deaf'):
        bench.script.with_name(name).write_text('sats_3-1_seed0')
    monkeypatch.setattr(scheduler_module, 'STOP_SECONDS', 0.2)
    scheduler = Scheduler([record], bench.script, Console(file=bench.told), poll=0.05)
    scheduler._start_ready()
    wait_for(lambda: (record.folder / 'stage_0/done').exists())
    (job,) = scheduler.running
    scheduler._stop()
    assert job.process.returncode == -signal.SIGKILL
    assert FileLock(record.folder / 'run.lock').acquire()


def test_a_run_with_other_values_is_not_gone_on_with(bench: Bench) -> None:
    assert bench.train(bench.records('sats', 'epochs=3')) == []
    (record,) = bench.records('sats', 'epochs=4')
    assert record.conflict() == 'epochs: 3 there, 4 asked'
    before = (record.folder / 'called').stat().st_mtime_ns
    assert bench.train([record]) == []
    assert 'epochs: 3 there, 4 asked' in bench.told.getvalue()
    assert (record.folder / 'called').stat().st_mtime_ns == before
    # Nor is its stage 0 taken.
    (other,) = bench.records('finetune', 'epochs=4')
    assert other.find_start() is None
    (same,) = bench.records('finetune', 'epochs=3')
    assert same.find_start() == record.folder / 'stage_0/snapshot.pth'


def test_a_stage_0_of_another_training_is_a_conflict(bench: Bench) -> None:
    assert bench.train(bench.records('sats', 'epochs=3')) == []
    (record,) = bench.records('finetune', 'epochs=4')
    record.folder.mkdir()
    text = bench.script.with_name('finetune_3-1_seed0.py').read_text()
    base = 'elsewhere/out/sats_3-1_seed0/stage_0/snapshot.pth'
    (record.folder / 'config.py').write_text(f'{text}\nbase = {base!r}\n')
    assert 'sats_3-1_seed0/stage_0/snapshot.pth, which is trained otherwise' in record.conflict()
    (record.folder / 'config.py').write_text(f'{text}\nbase = "/gone/run/stage_0/snapshot.pth"\n')
    assert 'whose config is gone' in record.conflict()
    assert Record(bench.out, record.run, accept=['base']).conflict() == ''


def test_a_config_that_cannot_be_read_is_a_conflict(bench: Bench) -> None:
    (record,) = bench.records('sats')
    record.folder.mkdir(parents=True)
    (record.folder / 'config.py').write_text('protocol = ')
    assert record.conflict().startswith('config.py there cannot be read: ')
