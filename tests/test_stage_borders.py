# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The table of docs/new_method.md: which weights a hook sees at each moment of a stage, and what its changes do."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from mmseg_sats.engine import unwrap
from mmseg_sats.engine.hooks import BestEpochHook
from tests.runs import Weights, same, weights

MakeConfig = Callable[..., Config]
MOMENTS = ['before_run', 'before_stage', 'before_train', 'after_train', 'before_snapshot', 'after_stage']
BIAS = 'decode_head.conv_seg.bias'


@HOOKS.register_module()
class Watch(Hook):
    """Notes the weights at each moment, and changes them where it is told to."""

    priority = 'LOWEST'
    seen: dict[tuple[int, str], Weights] = {}
    order: list[tuple[int, str]] = []
    files: dict[int, set[str]] = {}
    changes: dict[str, float] = {}
    stop_in: str | None = None

    def note(self, runner: Runner, moment: str) -> None:
        folder = Path(runner.work_dir)
        key = (int(folder.name.removeprefix('stage_')), moment)
        model = unwrap(runner.model)
        if key not in self.order:  # before_run comes again ahead of the evaluation
            self.order.append(key)
            self.seen[key] = {name: value.clone() for name, value in model.state_dict().items()}
        if moment in self.changes:
            with torch.no_grad():
                model.decode_head.conv_seg.bias.add_(self.changes[moment])

    def before_run(self, runner: Runner) -> None:
        self.note(runner, 'before_run')

    def before_stage(self, runner: Runner, stage: object) -> None:
        self.note(runner, 'before_stage')

    def before_train(self, runner: Runner) -> None:
        self.note(runner, 'before_train')

    def before_train_iter(self, runner: Runner, **_: Any) -> None:
        if self.stop_in and runner.work_dir.endswith(self.stop_in) and runner.epoch == 1:
            raise KeyboardInterrupt

    def after_train(self, runner: Runner) -> None:
        self.note(runner, 'after_train')

    def before_snapshot(self, runner: Runner, stage: object) -> None:
        self.note(runner, 'before_snapshot')

    def after_stage(self, runner: Runner, stage: Any, metrics: dict) -> None:
        self.files[stage.index] = {path.name for path in Path(runner.work_dir).iterdir()}
        self.note(runner, 'after_stage')


@pytest.fixture(autouse=True)
def watch() -> Iterator[type[Watch]]:
    """The hook, its notes empty."""
    Watch.seen, Watch.order, Watch.files, Watch.changes, Watch.stop_in = {}, [], {}, {}, None
    return Watch


@pytest.fixture
def run(shapes_cfg: MakeConfig) -> Callable[..., dict[tuple[int, str], Weights]]:
    """Trains two stages of two epochs under the hook; returns what it saw."""

    def train(name: str = 'run', **options: Any) -> dict[tuple[int, str], Weights]:
        cfg = shapes_cfg('sats', name, protocol='3-3', epochs=2, image_size=48, crop_size=48, **options)
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='Watch')]
        Watch.seen, Watch.order = {}, []
        RUNNERS.build(cfg).train()
        return Watch.seen

    return train


def starts_from(grown: Weights, snapshot: Weights) -> bool:
    """All tensors are alike, but that the classifier has new rows, and balanced biases of background."""
    rows = {key: slice(1, 4) if '.conv_seg.' in key else ... for key in grown}
    return all(torch.equal(value[rows[key]], snapshot[key][rows[key]]) for key, value in grown.items())


def test_a_fresh_start_and_a_resume(run: Callable, watch: type[Watch], tmp_path: Path) -> None:
    fresh = run()
    assert watch.order == [(stage, moment) for stage in (0, 1) for moment in MOMENTS]
    folder = tmp_path / 'run/stage_1'
    assert not same(fresh[1, 'before_run'], fresh[1, 'before_stage'])
    assert starts_from(fresh[1, 'before_stage'], weights(tmp_path / 'run/stage_0/snapshot.pth'))
    assert same(fresh[1, 'before_train'], fresh[1, 'before_stage'])
    assert same(fresh[1, 'after_train'], weights(folder / 'epoch_2.pth'))
    for moment in ('before_snapshot', 'after_stage'):
        assert same(fresh[1, moment], fresh[1, 'after_train'])
    assert same(weights(folder / 'snapshot.pth'), fresh[1, 'before_snapshot'])
    assert {'snapshot.pth', 'metrics.json', 'exemplars.json'} <= watch.files[1]
    assert 'done' not in watch.files[1]
    watch.stop_in = 'stage_1'
    with pytest.raises(KeyboardInterrupt):
        run('stopped')
    watch.stop_in = None
    resumed = run('stopped', resume=True)
    assert [moment for stage, moment in watch.order if stage == 1] == MOMENTS
    assert same(resumed[1, 'before_stage'], fresh[1, 'before_stage'])
    assert same(resumed[1, 'before_train'], weights(tmp_path / 'run/stage_1/epoch_1.pth'))
    for moment in ('after_train', 'before_snapshot', 'after_stage'):
        assert same(resumed[1, moment], fresh[1, moment])


def test_the_best_epoch_is_what_is_kept(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = BestEpochHook.after_val_epoch

    def first_is_best(self: BestEpochHook, runner: Runner, metrics: dict) -> None:
        inner(self, runner, dict.fromkeys(metrics, 90.0 - runner.epoch))

    monkeypatch.setattr(BestEpochHook, 'after_val_epoch', first_is_best)
    seen = run(held_out=0.5)
    first = weights(tmp_path / 'run/stage_1/epoch_1.pth')
    assert not same(seen[1, 'after_train'], first)
    for kept in (seen[1, 'before_snapshot'], seen[1, 'after_stage'], weights(tmp_path / 'run/stage_1/snapshot.pth')):
        assert same(kept, first)


def test_averaged_weights_are_what_is_kept(shapes_cfg: MakeConfig, tmp_path: Path, watch: type[Watch]) -> None:
    cfg = shapes_cfg('sats', protocol='3-3')
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='Watch'), dict(type='EMAHook', momentum=0.5)]
    RUNNERS.build(cfg).train()
    # mmengine exchanges the two when it saves: `state_dict` holds the average.
    average = dict(weights(tmp_path / 'run/stage_1/epoch_1.pth'))
    assert not same(watch.seen[1, 'after_train'], average)
    for kept in (watch.seen[1, 'before_snapshot'], weights(tmp_path / 'run/stage_1/snapshot.pth')):
        assert same(kept, average)


def test_what_a_hook_changes(run: Callable, watch: type[Watch], tmp_path: Path) -> None:
    watch.changes = dict(before_stage=3.0, before_snapshot=7.0, after_stage=100.0)
    seen = run()
    for stage in (0, 1):
        torch.testing.assert_close(seen[stage, 'before_train'][BIAS], seen[stage, 'before_stage'][BIAS] + 3)
        kept = weights(tmp_path / f'run/stage_{stage}/snapshot.pth')
        torch.testing.assert_close(kept[BIAS], seen[stage, 'before_snapshot'][BIAS] + 7)
        assert same(seen[stage, 'after_stage'], kept)  # so that is what was evaluated
    # What is done behind the snapshot changes nothing.
    assert starts_from(seen[1, 'before_stage'], weights(tmp_path / 'run/stage_0/snapshot.pth'))


def test_a_change_at_the_start_is_not_made_twice(run: Callable, watch: type[Watch], tmp_path: Path) -> None:
    watch.changes, watch.stop_in = dict(before_stage=3.0), 'stage_1'
    with pytest.raises(KeyboardInterrupt):
        run()
    watch.stop_in = None
    resumed = run(resume=True)
    assert same(resumed[1, 'before_train'], weights(tmp_path / 'run/stage_1/epoch_1.pth'))


def test_a_base_and_a_run_that_was_stopped_behind_its_snapshot(
    run: Callable, watch: type[Watch], tmp_path: Path
) -> None:
    run('first')
    base = tmp_path / 'first/stage_0/snapshot.pth'
    watch.changes = dict(before_snapshot=7.0)
    seen = run(base=str(base))
    assert [moment for stage, moment in watch.order if stage == 0] == [
        'before_stage', 'before_snapshot', 'before_run', 'after_stage',
    ]  # fmt: skip
    assert same(seen[0, 'before_stage'], weights(base))
    assert same(seen[0, 'before_snapshot'], weights(base))
    adopted = weights(tmp_path / 'run/stage_0/snapshot.pth')
    torch.testing.assert_close(adopted[BIAS], weights(base)[BIAS] + 7)
    stage = tmp_path / 'run/stage_1'
    kept, start = (stage / 'snapshot.pth').read_bytes(), seen[1, 'before_stage']
    for name in ('done', 'metrics.json'):
        (stage / name).unlink()
    shutil.rmtree(tmp_path / 'run/vis_data', ignore_errors=True)
    seen = run(base=str(base), resume=True)
    assert [moment for index, moment in watch.order if index == 1 and moment != 'before_run'] == [
        'before_stage', 'after_stage',
    ]  # fmt: skip
    assert same(seen[1, 'before_stage'], start)
    assert (stage / 'snapshot.pth').read_bytes() == kept
    assert (stage / 'done').exists()
