# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Every method of configs/ learns: two iterations of every stage on a few drawn images."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

CONFIGS = Path(__file__).parents[1] / 'configs'
METHODS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != '_base_')


def logged(folder: Path) -> list[dict]:
    """What each iteration of a stage wrote down."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


@pytest.mark.parametrize('method', METHODS)
def test_two_iterations_of_every_stage(
    method: str, shapes_cfg: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = shapes_cfg(method, batch_size=4)
    if cfg.protocol != 'joint':
        cfg.protocol = '4-1'  # the fewest stages that hold a second later one
    cfg.train_dataloader.num_batch_per_epoch = 2
    cfg.test_dataloader.num_batch_per_epoch = 2
    cfg.default_hooks.logger.interval = 1
    stages = RUNNERS.build(cfg).train()['stages']
    assert len(stages) == (1 if cfg.protocol == 'joint' else 3)
    for stage in stages:
        iterations = logged(tmp_path / f'run/stage_{stage["stage"]}')
        assert len(iterations) == 2
        parts = {f'loss_{name}' for name, part in cfg.distillation.items() if part is not None}
        for losses in iterations:
            assert {name for name in losses if name.startswith('loss_')} == (parts if stage['stage'] else set())
            assert all(math.isfinite(value) for value in losses.values())
            assert losses['loss'] > 0
        # In the first step of a stage, a feature distillation may still be 0.
        assert all(iterations[1][name] > 0 for name in parts if stage['stage'])
