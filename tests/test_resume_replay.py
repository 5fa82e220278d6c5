# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs with exemplars and outside images, or without pseudo-labels, resume at an iteration as if never stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from tests.test_resume import Draws, on_a_cpu, same_weights


@HOOKS.register_module()
class StopBefore(Hook):
    """Stops stage 1 before an iteration; the config is the same whether it does or not."""

    iteration: int | None = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if runner.work_dir.endswith('stage_1') and runner.iter == self.iteration:
            raise KeyboardInterrupt


@on_a_cpu
def test_a_run_with_replay_resumes_within_an_epoch(
    shapes_cfg: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, **options: object) -> Config:
        base = dict(protocol='3-3', epochs=2, train_images=14, val_images=6, batch_size=6, checkpoint_iters=1, memory=6)
        cfg = shapes_cfg('recall', name, **base | options)
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='Draws'), dict(type='StopBefore')]
        return cfg

    Draws.seen.clear()
    RUNNERS.build(make('whole')).train()
    drawn = dict(Draws.seen)
    monkeypatch.setattr(StopBefore, 'iteration', 4)
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(make('run')).train()
    monkeypatch.setattr(StopBefore, 'iteration', None)
    Draws.seen.clear()
    RUNNERS.build(make('run', resume=True)).train()
    left = {key: value for key, value in drawn.items() if key[0] == '1' and key[1] >= 4}
    assert {key: value for key, value in Draws.seen.items() if key[0] == '1'} == left
    assert left
    assert same_weights(*(tmp_path / name / 'stage_1/snapshot.pth' for name in ('run', 'whole')))
    for name in ('stage_0/exemplars.json', 'stage_1/exemplars.json', 'results.json'):
        assert (tmp_path / 'run' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


@on_a_cpu
def test_a_run_without_pseudo_labels_resumes_within_an_epoch(
    shapes_cfg: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads its old model in the first iteration of a stage, where that draws random numbers."""

    def make(name: str, **options: object) -> Config:
        small = dict(protocol='3-3', train_images=14, val_images=6, batch_size=4, checkpoint_iters=1)
        cfg = shapes_cfg('mib', name, **small | options)
        cfg.model.decode_head.dropout_ratio = 0.3
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='StopBefore')]
        return cfg

    RUNNERS.build(make('whole')).train()
    monkeypatch.setattr(StopBefore, 'iteration', 1)
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(make('run')).train()
    monkeypatch.setattr(StopBefore, 'iteration', None)
    RUNNERS.build(make('run', resume=True)).train()
    assert same_weights(*(tmp_path / name / 'stage_1/snapshot.pth' for name in ('run', 'whole')))
