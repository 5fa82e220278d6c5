# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A run that was stopped and resumed is the run that was not; nothing it reads is half-written."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from mmseg.registry import DATASETS

from mmseg_sats.engine import AtomicCheckpointHook
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.files.snapshot import is_whole, latest_checkpoint
from mmseg_sats.engine.files.work_dir import check_same_run
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.engine.training.train_loop import EXIT_PREEMPTED
from mmseg_sats.protocol import Protocol
from mmseg_sats.utils.checkpoint import check_checksum, load_checkpoint_safely, write_checkpoint
from mmseg_sats.utils.randomness import seed_all, seeded
from tests.forked import PACKAGE, run_forked

on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason='bit for bit on a CPU; a GPU adds up in an order of its own'
)

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[1]


@HOOKS.register_module()
class Interrupt(Hook):
    """Stops stage 1 before iteration ``at``: by an error, or by SIGTERM to every process.

    Not told by the config, which must be the same when the run is resumed.
    """

    at: int | None = None
    by_signal = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if not runner.work_dir.endswith('stage_1') or runner.iter != self.at:
            return
        if not self.by_signal:
            raise KeyboardInterrupt
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.2)
        signal.raise_signal(signal.SIGTERM)


@HOOKS.register_module()
class Draws(Hook):
    """Notes a number of each generator at the start of every iteration, and each batch's images."""

    seen: dict = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        numbers = random.random(), float(np.random.rand()), float(torch.rand(()))
        names = tuple(sample.img_path for sample in data_batch['data_samples'])
        total = float(sum(image.double().sum() for image in data_batch['inputs']))
        self.seen[runner.work_dir.rsplit('_', 1)[1], runner.iter] = (batch_idx, numbers, names, total)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets where the next runs stop: ``interrupt(at, by_signal=False)``; None: nowhere."""

    def set_(at: int | None, by_signal: bool = False) -> None:
        monkeypatch.setattr(Interrupt, 'at', at)
        monkeypatch.setattr(Interrupt, 'by_signal', by_signal)

    return set_


def make(shapes_cfg: MakeConfig, name: str, **options: Any) -> Config:
    """Two stages of SATS with dropout and EMA; 3 iterations an epoch, gradients of two collected."""
    base = dict(protocol='3-3', epochs=3, train_images=18, batch_size=4, checkpoint_iters=2)
    cfg = shapes_cfg('sats', name, **base | options)
    cfg.model.decode_head.dropout_ratio = 0.3
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='EMAHook'), dict(type='Draws'), dict(type='Interrupt')]
    return cfg


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_checkpoint_safely(path)['state_dict'] for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def differing(one: Any, other: Any, path: str = '') -> list[str]:
    """Where two nestings of dicts, lists, tensors and values differ."""
    if isinstance(one, dict):
        keys = [f'{path}: other keys'] if one.keys() != other.keys() else []
        return keys + [p for k in one if k in other for p in differing(one[k], other[k], f'{path}.{k}')]
    if isinstance(one, list | tuple):
        return [p for i, (a, b) in enumerate(zip(one, other, strict=True)) for p in differing(a, b, f'{path}[{i}]')]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if one == other else [path]


@pytest.fixture(scope='module')
def untouched(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The run that nobody stops, and what it drew."""
    root = tmp_path_factory.mktemp('untouched')

    def shapes_cfg(method: str, name: str, **options: Any) -> Config:
        cfg = Config.fromfile(ROOT / f'configs/{method}/segformer_tiny_shapes_3-1.py')
        small = dict(data_root=str(shapes_root), image_size=64, crop_size=64, val_images=12, report=None)
        cfg.merge_from_dict(small | dict(work_dir=str(root / name)) | options)
        return cfg

    Draws.seen.clear()
    RUNNERS.build(make(shapes_cfg, 'run')).train()
    return root / 'run', dict(Draws.seen)


@on_a_cpu
@pytest.mark.parametrize('at', [2, 3, 4])
def test_resume_at_an_iteration(
    at: int,
    untouched: tuple[Path, dict],
    shapes_cfg: MakeConfig,
    tmp_path: Path,
    interrupt: Callable[..., None],
) -> None:
    """Stopped within an epoch (4), at its start (3), behind a checkpoint of its last iteration (2)."""
    expected, drawn = untouched
    interrupt(at)
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(make(shapes_cfg, 'run')).train()
    interrupt(None)
    run = tmp_path / 'run'
    stood = load_checkpoint_safely(latest_checkpoint(run / 'stage_1'))['meta']
    assert stood['iter'] == {2: 2, 3: 3, 4: 4}[at]
    Draws.seen.clear()
    RUNNERS.build(make(shapes_cfg, 'run', resume=True)).train()
    assert (run / 'results.json').read_bytes() == (expected / 'results.json').read_bytes()
    assert same_weights(run / 'stage_1/snapshot.pth', expected / 'stage_1/snapshot.pth')
    one, other = (load_checkpoint_safely(root / 'stage_1/epoch_3.pth') for root in (run, expected))
    for key in ('optimizer', 'param_schedulers', 'ema_state_dict'):
        assert differing(one[key], other[key]) == []
    losses = [part['message_hub']['log_scalars']['train/loss'].data[0] for part in (one, other)]
    np.testing.assert_array_equal(*losses)
    # From the stopped iteration on: the same places, numbers of all generators, images, crops.
    left = {key: value for key, value in drawn.items() if key[0] == '1' and key[1] >= at}
    assert {key: value for key, value in Draws.seen.items() if key[0] == '1'} == left


@on_a_cpu
def test_sigterm_writes_a_checkpoint_and_exits(
    untouched: tuple[Path, dict],
    shapes_cfg: MakeConfig,
    tmp_path: Path,
    interrupt: Callable[..., None],
) -> None:
    """With workers, which get the signal too; and the number of workers changes nothing."""
    interrupt(4, by_signal=True)
    cfg = make(shapes_cfg, 'run', num_workers=2, checkpoint_iters=None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        RUNNERS.build(cfg).train()
    assert stopped.value.code == EXIT_PREEMPTED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    meta = load_checkpoint_safely(tmp_path / 'run/stage_1/iter_5.pth')['meta']
    assert (meta['epoch'], meta['iter']) == (1, 5)
    interrupt(None)
    cfg = make(shapes_cfg, 'run', resume=True, num_workers=2, persistent_workers=True)
    RUNNERS.build(cfg).train()
    expected = untouched[0]
    assert same_weights(tmp_path / 'run/stage_1/snapshot.pth', expected / 'stage_1/snapshot.pth')
    assert (tmp_path / 'run/results.json').read_bytes() == (expected / 'results.json').read_bytes()


# What ends the run, whether it is in a process of multiprocessing, and the exit code.
ENDINGS = [
    ('os.kill(os.getpid(), signal.SIGTERM)', False, EXIT_PREEMPTED),
    # Python tells of Ctrl-C by dying of it.
    ('os.kill(os.getpid(), signal.SIGINT)', False, -signal.SIGINT),
    # Such a process ends in another way than the interpreter does.
    ("raise ValueError('of the test')", True, 1),
]
ENDING = """
import multiprocessing, os, signal, sys, time
# Ignored in what a shell starts behind its back.
signal.signal(signal.SIGINT, signal.default_int_handler)
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS

@HOOKS.register_module()
class Ending(Hook):
    def after_train_iter(self, runner, *args, **kwargs):
        time.sleep(0.5)
        {what}

train = RUNNERS.build(Config.fromfile({config!r})).train
if {in_a_child}:
    child = multiprocessing.Process(target=train)
    child.start()
    child.join()
    sys.exit(child.exitcode)
train()
"""


def test_a_process_with_workers_ends_when_its_run_does(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    """The signal comes to the process alone, not to its workers, which wait for work meanwhile."""
    scripts = []
    for number, (what, in_a_child, _) in enumerate(ENDINGS):
        cfg = make(shapes_cfg, f'run_{number}', num_workers=1, persistent_workers=True)
        cfg.custom_hooks = [dict(type='PseudoLabelThresholdHook'), dict(type='Ending')]
        path = tmp_path / f'config_{number}.py'
        cfg.dump(path)
        scripts.append(ENDING.format(config=str(path), what=what, in_a_child=in_a_child))
    done = run_forked(PACKAGE, scripts)
    assert [one.returncode for one in done] == [code for *_, code in ENDINGS], done
    assert not [one for one in done if 'DataLoader worker' in one.stderr]


def test_a_checkpoint_of_other_epochs_is_refused(
    shapes_cfg: MakeConfig, tmp_path: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(4)
    cfg = make(shapes_cfg, 'run')
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(cfg).train()
    stage = Config.fromfile(tmp_path / 'run/stage_1/config.py')
    interrupt(None)
    stage.train_dataloader.batch_size = 1
    stage.resume, stage.load_from = True, str(tmp_path / 'run/stage_1/iter_4.pth')
    with pytest.raises(ValueError, match='iteration 4 of epoch 1, which does not fit epochs of'):
        Runner.from_cfg(stage).train()


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_draws_from_its_key_and_leaves_no_trace() -> None:
    seed_all(1, 2, 3)
    expected = [draws(), draws()]
    seed_all(1, 2, 3)
    first = draws()
    with seeded(5, 0):
        inside = draws()
    assert [first, draws()] == expected
    keys = [(5, 0), (0, 5), (5,), (5, 0, 0), (5, 1)]
    numbers = []
    for key in keys:
        with seeded(*key):
            numbers.append(draws())
    assert numbers[0] == inside
    for column in zip(*numbers, strict=True):
        assert len(set(column)) == len(keys)


@pytest.mark.parametrize('persistent', [False, True])
def test_augmentation_does_not_depend_on_the_workers(
    persistent: bool, shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    cfg = make(shapes_cfg, 'run')
    protocol = Protocol('3-3', 6)
    runner_cfg = build_stage_config(cfg, protocol, protocol.stages[1], cfg.work_dir)
    images: list[dict] = []
    for workers in (0, 1, 3):
        dataset = DATASETS.build(runner_cfg.train_dataloader.dataset)
        loader = Runner.build_dataloader(
            dict(
                dataset=dataset,
                batch_size=4,
                num_workers=workers,
                persistent_workers=persistent and workers > 0,
                sampler=dict(type='DefaultSampler', shuffle=False),
            )
        )
        seen = {}
        for epoch in (0, 1):
            loader.dataset.set_epoch(epoch)
            items = [image for batch in loader for image in batch['inputs']]
            seen |= {(epoch, index): image for index, image in enumerate(items)}
        images.append(seen)
    assert differing(images[0], images[1]) == differing(images[0], images[2]) == []
    half = len(images[0]) // 2
    moved = sum(not torch.equal(images[0][0, i], images[0][1, i]) for i in range(half))
    assert moved > half / 4  # another epoch, other flips


def test_a_changed_snapshot_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'snapshot.pth'
    write_checkpoint(path, dict(state_dict=dict(a=torch.arange(1000.0))))
    assert is_whole(path)
    command = ['sha256sum', '--check', 'snapshot.pth.sha256']
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # torch itself reads this without a word
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=rf'{path} is damaged.*snapshot.pth.sha256 says'):
        load_checkpoint_safely(path)
    assert not is_whole(path)
    (tmp_path / 'snapshot.pth.sha256').unlink()
    check_checksum(path)
    assert not is_whole(path)


def test_older_checkpoints_go_when_the_new_one_stands(
    shapes_cfg: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = []
    write = AtomicCheckpointHook._write

    def watched(self: AtomicCheckpointHook, runner: Runner, name: str, meta: dict) -> None:
        before = {path.name for path in Path(runner.work_dir).glob('*.pth')}
        write(self, runner, name, meta)
        standing.append((before, {path.name for path in Path(runner.work_dir).glob('*.pth')}))

    monkeypatch.setattr(AtomicCheckpointHook, '_write', watched)
    RUNNERS.build(make(shapes_cfg, 'run', protocol='joint', split='3-3', epochs=2)).train()
    assert len(standing) == 7  # iterations 2, 4, 6, 8, 10 and two epochs of 5
    for before, after in standing[2:]:
        assert len(before) == len(after) == 2
        assert len(before & after) == 1


@pytest.mark.parametrize('options', [dict(iters=0), dict(iters=True), dict(max_keep_ckpts=0)])
def test_impossible_intervals(options: dict) -> None:
    with pytest.raises(ValueError, match=rf'{next(iter(options))}=.*whole number from 1'):
        AtomicCheckpointHook(**options)


def run_kills(out: Path, *words: str) -> None:
    script = f'import sys\nfrom tests import kill\nsys.exit(kill.main({["--out", str(out), *words]}))'
    (result,) = run_forked(PACKAGE, [script])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    done, of, total, identical = result.stdout.strip().split('\n')[-1].split(' ')
    assert (done, of, identical) == (total, 'of', 'identical')


@on_a_cpu
def test_killed_runs_end_as_the_others(tmp_path: Path) -> None:
    """The short form of ``make test-kill``. Stages of iterations are stopped in test_resume_iterations.py."""
    run_kills(tmp_path, '--bare', '--moments', '1', '--events', '2', '--full', '1', '--jobs', '2')


@on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize('iters', [(), ('--iters', '5')], ids=['epochs', 'iterations'])
def test_killed_everywhere(iters: tuple[str, ...], tmp_path: Path) -> None:
    run_kills(tmp_path, '--moments', '30', '--jobs', '2', *iters)


def test_a_path_may_be_spelt_in_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, a run's base has another name, and is the same file."""
    (tmp_path / 'base.pth').touch()
    (tmp_path / 'other.pth').touch()
    Config(dict(base=str(tmp_path / 'base.pth'))).dump(tmp_path / 'config.py')
    monkeypatch.chdir(tmp_path)
    check_same_run(tmp_path, Config(dict(base='./base.pth')))
    with pytest.raises(ValueError, match=r"base: '.* there, 'other\.pth' in the config"):
        check_same_run(tmp_path, Config(dict(base='other.pth')))


EVALUATION = r'the evaluation is not that of the run so far: {}.* Training is the same\.'


@pytest.mark.parametrize(
    ('method', 'before', 'change', 'note', 'refusal'),
    [
        # What the evaluation alone reads may be corrected.
        ('sats', {}, {'test_dataloader.batch_size': 4}, r'test_dataloader\.batch_size: 1 there, 4', ''),
        ('sats', {}, {'test_evaluator': [dict(type='IncrementalIoUMetric', prefix='a')]}, 'test_evaluator: ', ''),
        ('sats', {}, dict(eval_images='all', eval_future='ignore'), "eval_future: .*; eval_images: 'seen' there", ''),
        ('sats', {}, dict(eval_pipeline=[dict(type='LoadImageFromFile')]), 'eval_pipeline: ', ''),
        ('finetune', {}, dict(test_pipeline=[dict(type='LoadImageFromFile')]), 'test_pipeline: ', ''),
        ('sats', {}, {'train_dataloader.num_workers': 3}, '', ''),
        # What is read elsewhere too may not.
        ('sats', {}, dict(test_pipeline=[]), '', r'test_pipeline: .*\(test_pipeline is used .*: set eval_pipeline'),
        ('sats', dict(held_out=0.2), {'test_dataloader.batch_size': 4}, '', r'\(test_dataloader: used in training too'),
        ('finetune', dict(early_stop='$eval_pipeline'), dict(test_pipeline=[]), '', r'\(test_pipeline'),
        ('finetune', {}, {'test_dataloader.batch_size': 4, 'lr': 0.5}, '', r'another run: lr: [0-9.]+ there, 0\.5 in '
         r'the config\. To resume, .* or name another work dir; --base .*/stage_0/snapshot\.pth starts it from'),
    ],
)  # fmt: skip
def test_what_cannot_change_the_training_may_be_corrected(
    shapes_cfg: MakeConfig, method: str, before: dict, change: dict, note: str, refusal: str
) -> None:
    cfg = shapes_cfg(method, **before)
    work_dir = Path(cfg.work_dir)
    (work_dir / 'stage_0').mkdir(parents=True)
    (work_dir / 'stage_0/snapshot.pth').touch()
    cfg.dump(work_dir / 'config.py')
    for key, value in change.items():
        if '.' not in key:
            cfg.pop(key)  # replaced, not merged
        cfg.merge_from_dict({key: value})
    protocol = build_protocol(cfg)
    stage = build_stage_config(cfg, protocol, protocol.stage(1), work_dir)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            check_same_run(work_dir, cfg, stage)
        return
    told = check_same_run(work_dir, cfg, stage)
    assert re.match(EVALUATION.format(note), told) if note else told == ''
    assert 'keep their figures' not in told
    (work_dir / 'stage_0/metrics.json').touch()
    if note:
        assert f'(stage_0) keep their figures; `mmseg-sats test {work_dir}`' in check_same_run(work_dir, cfg, stage)
