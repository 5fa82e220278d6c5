# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A part of the training images is held out, and the epoch that is best on it becomes the snapshot."""

import logging
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from mmseg.registry import DATASETS

from mmseg_sats.datasets.held_out import held_out
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.files.snapshot import latest_checkpoint
from mmseg_sats.engine.hooks import BestEpochHook
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.engine.training.train_loop import EXIT_PREEMPTED
from mmseg_sats.utils.checkpoint import load_checkpoint_safely, read_json, write_json
from tests.runs import same, weights

MakeConfig = Callable[..., Config]


def held_out_by_loop(names: list[str], tenths: int) -> set[str]:
    """Goes through the sorted names with a purse: each puts tenths in, the held-out ones cost ten."""
    held, purse = set(), 9
    for name in sorted(names):
        purse += tenths
        if purse >= 10:
            held.add(name)
            purse -= 10
    return held


@pytest.mark.parametrize('tenths', range(1, 10))
def test_names_are_held_out_evenly_and_whatever_their_order(tenths: int) -> None:
    for count in (0, 1, 2, 9, 10, 11, 1077):
        names = [f'{number:05d}' for number in range(count)]
        random.Random(count).shuffle(names)
        marks = held_out(names, tenths / 10)
        held = {name for name, mark in zip(names, marks, strict=True) if mark}
        assert held == held_out_by_loop(names, tenths)
        assert len(held) == -(-count * tenths // 10)


@pytest.mark.parametrize('share', [0, 1, 1.5, -0.1, True, '0.2', math.nan])
def test_an_impossible_share_is_refused_before_training(
    shapes_cfg: MakeConfig, share: Any
) -> None:
    with pytest.raises(ValueError, match='expected the share of the training images'):
        RUNNERS.build(shapes_cfg('sats', held_out=share))


def test_a_second_validation_is_refused(shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('sats', held_out=0.2)
    cfg.val_dataloader = cfg.test_dataloader
    with pytest.raises(ValueError, match='the config has one of its own: expected one of the two'):
        RUNNERS.build(cfg)


def test_a_class_that_no_held_out_image_shows_is_named(shapes_cfg: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r'no held-out image shows .*square.*: expected every class'):
        RUNNERS.build(shapes_cfg('sats', held_out=0.05))


def stage_configs(cfg: Config) -> list[Config]:
    protocol = build_protocol(cfg)
    return [build_stage_config(cfg, protocol, stage, cfg.work_dir) for stage in protocol.stages]


def test_a_stage_trains_with_the_rest_and_validates_on_the_held_out(
    shapes_cfg: MakeConfig,
) -> None:
    whole = stage_configs(shapes_cfg('sats'))
    held = set()
    for cfg, all_images in zip(stage_configs(shapes_cfg('sats', held_out=0.25)), whole, strict=True):
        train, val = (
            DATASETS.build(loader.dataset) for loader in (cfg.train_dataloader, cfg.val_dataloader)
        )
        every = DATASETS.build(all_images.train_dataloader.dataset)
        fit, chosen = set(train.image_files()), set(val.image_files())
        assert fit
        assert chosen
        assert not fit & chosen
        assert fit == set(every.image_files()) - chosen
        held |= chosen
        # What is validated is labelled as what is evaluated, and neither flipped nor cropped.
        assert val.metainfo['classes'] == train.metainfo['classes']
        assert cfg.default_hooks.logger.log_metric_by_epoch is False  # one axis with the losses
        assert np.array_equal(val.table, DATASETS.build(cfg.test_dataloader.dataset).table)
        names = [type(transform).__name__ for transform in val.pipeline.transforms]
        assert names[0] == 'LoadImageFromFile'
        assert 'RandomCrop' not in names
    assert len(held) <= 6  # of 24, the same ones in every stage


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What the epochs score on the held-out images, instead of what they do; no score interrupts."""
    scores: dict[int, float] = {}
    inner = BestEpochHook.after_val_epoch

    def after_val_epoch(self: BestEpochHook, runner: Runner, metrics: dict[str, float]) -> None:
        # A validation is not the end of an iteration: SIGTERM ends the process at once.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if runner.epoch not in scores:
            raise KeyboardInterrupt
        inner(self, runner, metrics | dict(mIoU_all=scores[runner.epoch]))

    monkeypatch.setattr(BestEpochHook, 'after_val_epoch', after_val_epoch)
    return scores


def make(shapes_cfg: MakeConfig, name: str, **options: Any) -> Config:
    """Two stages with averaged weights; the checkpoints of all epochs stay."""
    cfg = shapes_cfg('sats', name, protocol='3-3', epochs=3, held_out=0.34, **options)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='EMAHook')]
    cfg.default_hooks.checkpoint.max_keep_ckpts = 9
    return cfg


def test_the_best_epoch_becomes_the_snapshot_also_of_a_run_that_was_stopped(
    shapes_cfg: MakeConfig, scores: dict[int, float]
) -> None:
    scores.update({1: 10.0, 2: 30.0, 3: 30.0})
    cfg = make(shapes_cfg, 'run')
    RUNNERS.build(cfg).train()
    work_dir = Path(cfg.work_dir)
    for index in range(2):
        folder = work_dir / f'stage_{index}'
        assert read_json(folder / 'held_out.json') == {'1': 10.0, '2': 30.0, '3': 30.0}
        # Of two that are alike the first; with EMA, a checkpoint's weights are the averaged ones.
        assert same(weights(folder / 'snapshot.pth'), weights(folder / 'epoch_2.pth'))
        assert not same(weights(folder / 'snapshot.pth'), weights(folder / 'epoch_3.pth'))

    del scores[2]
    stopped = make(shapes_cfg, 'stopped', base=str(work_dir / 'stage_0/snapshot.pth'))
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(stopped).train()
    folder = Path(stopped.work_dir) / 'stage_1'
    assert read_json(folder / 'held_out.json') == {'1': 10.0}
    scores[2] = 30.0
    stopped.resume = True
    RUNNERS.build(stopped).train()
    assert read_json(folder / 'held_out.json') == {'1': 10.0, '2': 30.0, '3': 30.0}
    assert same(weights(folder / 'snapshot.pth'), weights(work_dir / 'stage_1/snapshot.pth'))


def test_validating_changes_nothing_of_the_training(shapes_cfg: MakeConfig) -> None:
    cfg = stage_configs(make(shapes_cfg, 'validated'))[0]
    plain = stage_configs(make(shapes_cfg, 'plain'))[0]
    plain.val_dataloader = plain.val_cfg = plain.val_evaluator = None
    plain.custom_hooks = [hook for hook in plain.custom_hooks if hook['type'] != 'BestEpochHook']
    for stage in (cfg, plain):
        Runner.from_cfg(stage).train()
    last = [Path(stage.work_dir) / 'epoch_3.pth' for stage in (cfg, plain)]
    assert same(weights(last[0]), weights(last[1]))
    # The scores are those of the held-out images, whatever they are.
    scores = read_json(Path(cfg.work_dir) / 'held_out.json')
    assert list(scores) == ['1', '2', '3']
    assert all(0 <= score <= 100 for score in scores.values())


@HOOKS.register_module()
class SigtermBehindTheEpoch(Hook):
    """Sends SIGTERM once the first epoch's checkpoint is written."""

    priority = 'LOWEST'

    def after_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 0:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_while_an_epoch_ends_is_heard(shapes_cfg: MakeConfig) -> None:
    cfg = stage_configs(make(shapes_cfg, 'run'))[0]
    cfg.custom_hooks.append(dict(type='SigtermBehindTheEpoch'))
    with pytest.raises(SystemExit) as stopped:
        Runner.from_cfg(cfg).train()
    assert stopped.value.code == EXIT_PREEMPTED
    folder = Path(cfg.work_dir)
    assert not (folder / 'held_out.json').exists()
    meta = load_checkpoint_safely(latest_checkpoint(folder))['meta']
    assert meta['epoch'] == 1


def test_an_epoch_without_a_figure_is_no_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sixth and the seventh come again, from a checkpoint before them, and differ a little.
    scores = dict(enumerate([math.nan, 5.0, math.nan, 4.0, 5.0, 6.0], start=1)) | {7: 5.5}
    kept: list[int] = []
    module = 'mmseg_sats.engine.hooks.best_epoch_hook'
    monkeypatch.setattr(f'{module}.trained_weights', lambda runner: runner.epoch)
    monkeypatch.setattr(f'{module}.write_checkpoint', lambda path, weights: kept.append(weights))
    hook, logger = BestEpochHook(), logging.getLogger('held out')
    for epoch, score in [*scores.items(), (6, 5.9), (7, 5.95)]:
        runner = SimpleNamespace(epoch=epoch, work_dir=str(tmp_path), logger=logger, train_loop=None)
        hook.after_val_epoch(runner, dict(mIoU_base=0.0, mIoU_all=score))
    assert kept == [1, 2, 6]
    noted = read_json(tmp_path / 'held_out.json')
    assert noted == {str(epoch): None if math.isnan(score) else score for epoch, score in scores.items()}


def test_a_stage_that_starts_afresh_does_not_take_up_the_scores_of_another_run(tmp_path: Path) -> None:
    write_json(tmp_path / 'held_out.json', {'1': 90.0})
    hook = BestEpochHook()
    hook.before_train(SimpleNamespace(epoch=0, iter=0, work_dir=str(tmp_path), train_loop=None))
    assert hook.scores == {}


@pytest.mark.parametrize(
    ('done', 'begin', 'interval', 'validated'),
    [(3, 1, 2, False), (4, 1, 2, True), (4, 5, 2, False), (5, 1, 2, True), (0, 1, 1, False)],
)
@pytest.mark.parametrize('by_iterations', [False, True])
def test_a_resumed_run_validates_what_the_run_would_have(
    by_iterations: bool, done: int, begin: int, interval: int, validated: bool, tmp_path: Path
) -> None:
    """Of five epochs of three iterations, or of five iterations in passes of three."""
    ran: list[int] = []
    loop = SimpleNamespace(
        val_begin=begin, val_interval=interval, max_iters=5 if by_iterations else 15, by_iterations=by_iterations
    )
    epoch, iteration = (done // 3, done) if by_iterations else (done, 3 * done)
    runner = SimpleNamespace(
        epoch=epoch, iter=iteration, work_dir=str(tmp_path), train_dataloader=range(3), train_loop=loop,
        val_loop=SimpleNamespace(run=lambda: ran.append(done)),
    )  # fmt: skip
    BestEpochHook().before_train(runner)
    assert bool(ran) is validated
