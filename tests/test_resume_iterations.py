# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage counted in iterations, stopped and resumed, is the stage that was not; what is by epoch elsewhere works."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from mmseg_sats.engine.files.snapshot import latest_checkpoint
from mmseg_sats.engine.training.train_loop import EXIT_PREEMPTED
from mmseg_sats.utils.checkpoint import load_checkpoint_safely, read_json
from tests.test_resume import Draws, Interrupt, differing, on_a_cpu, same_weights

MakeConfig = Callable[..., Config]


@HOOKS.register_module()
class InValidation(Hook):
    """What holds while a stage is validated within a pass: SIGTERM ends the process at once and loses nothing."""

    seen: list = []

    def before_val_epoch(self, runner: Runner) -> None:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        meta = load_checkpoint_safely(latest_checkpoint(Path(runner.work_dir)))['meta']
        assert meta['iter'] == runner.iter
        self.seen.append((Path(runner.work_dir).name, runner.iter))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        assert runner.model.training
        assert batch_idx == runner.iter
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert len(data_batch['inputs']) == 4


def make(shapes_cfg: MakeConfig, name: str, **options: Any) -> Config:
    """Two stages of 8 and 7 iterations of endless batches, validated within the passes over the images."""
    base = dict(protocol='3-3', iters=8, train_images=18, batch_size=4, held_out=0.34, memory=6)
    cfg = shapes_cfg('sats', name, **base | options)
    cfg.merge_from_dict({'later_stages.iters': 7, 'train_cfg.max_iters': '$iters', 'train_cfg.val_interval': 3})
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    cfg.model.decode_head.dropout_ratio = 0.3
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=4, max_keep_ckpts=9)
    names = ('EMAHook', 'Draws', 'Interrupt', 'InValidation')
    cfg.custom_hooks = [*cfg.custom_hooks, *(dict(type=hook) for hook in names)]
    return cfg


@on_a_cpu
def test_a_stage_of_iterations_resumes_bit_for_bit(
    shapes_cfg: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Draws.seen.clear()
    InValidation.seen.clear()
    RUNNERS.build(make(shapes_cfg, 'whole')).train()
    drawn, whole = dict(Draws.seen), tmp_path / 'whole'
    assert [sum(key[0] == stage for key in drawn) for stage in '01'] == [8, 7]
    validated = dict(stage_0=[3, 6, 8], stage_1=[3, 6, 7])
    assert InValidation.seen == [(stage, number) for stage, numbers in validated.items() for number in numbers]
    for index, last in ((0, 8), (1, 7)):
        scores = read_json(whole / f'stage_{index}/held_out.json')
        assert list(scores) == ['3', '6', str(last)]
        names = {path.name for path in (whole / f'stage_{index}').glob('iter_*.pth')}
        assert names == {f'iter_{number}.pth' for number in (3, 4, 6, last)}
        # With EMA, a checkpoint's weights are the averaged ones.
        best = max(scores, key=lambda key: scores[key])
        assert same_weights(whole / f'stage_{index}/snapshot.pth', whole / f'stage_{index}/iter_{best}.pth')
        (log,) = (whole / f'stage_{index}').glob('*/*.log')
        assert f'iteration {last} of {last}: ' in (text := log.read_text())
        assert 'training left: 0:00:00 for the stage' in text
        (scalars,) = (whole / f'stage_{index}').glob('*/vis_data/scalars.json')
        lines = [json.loads(line) for line in scalars.read_text().splitlines()]
        assert [line['step'] for line in lines if 'mIoU_all' in line] == [3, 6, last]  # one axis with the losses

    # Stopped by SIGTERM within a pass, with workers; by Ctrl-C where the validation of an iteration is missing.
    monkeypatch.setattr(Interrupt, 'at', 4)
    monkeypatch.setattr(Interrupt, 'by_signal', True)
    with pytest.raises(SystemExit) as stopped:
        RUNNERS.build(make(shapes_cfg, 'run', num_workers=2)).train()
    assert stopped.value.code == EXIT_PREEMPTED
    assert load_checkpoint_safely(latest_checkpoint(tmp_path / 'run/stage_1'))['meta']['iter'] == 5
    monkeypatch.setattr(Interrupt, 'at', None)
    monkeypatch.setattr(InValidation, 'before_val_epoch', interrupt_validation)
    Draws.seen.clear()
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(make(shapes_cfg, 'run', resume=True, num_workers=1, persistent_workers=True)).train()
    assert list(read_json(tmp_path / 'run/stage_1/held_out.json')) == ['3']
    monkeypatch.undo()
    RUNNERS.build(make(shapes_cfg, 'run', resume=True)).train()
    left = {key: value for key, value in drawn.items() if key[0] == '1' and key[1] >= 5}
    assert Draws.seen == left  # the same places, numbers of all generators, images, crops
    for name in ('results.json', 'stage_1/held_out.json', 'stage_1/exemplars.json'):
        assert (tmp_path / 'run' / name).read_bytes() == (whole / name).read_bytes()
    assert same_weights(tmp_path / 'run/stage_1/snapshot.pth', whole / 'stage_1/snapshot.pth')
    one, other = (load_checkpoint_safely(root / 'stage_1/iter_7.pth') for root in (tmp_path / 'run', whole))
    for key in ('optimizer', 'param_schedulers', 'ema_state_dict'):
        assert differing(one[key], other[key]) == []
    losses = [part['message_hub']['log_scalars']['train/loss'].data[0] for part in (one, other)]
    np.testing.assert_array_equal(*losses)


def interrupt_validation(self: InValidation, runner: Runner) -> None:
    raise KeyboardInterrupt
