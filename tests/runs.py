# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What tests ask of runs: their weights, what they logged, and that they stop at a place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmseg_sats.engine.training.train_loop import ResumableTrainLoop
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

Weights = dict[str, torch.Tensor]


def weights(path: Path) -> Weights:
    """The tensors of a snapshot or checkpoint."""
    return load_checkpoint_safely(path)['state_dict']


def same(one: Weights, other: Weights) -> bool:
    """Whether names and values are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def logged(folder: Path) -> list[dict[str, float]]:
    """What each iteration of a stage wrote down."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


def train_interrupted(cfg: Config, owner: type, method: str, here: Callable[..., bool]) -> dict[str, Any]:
    """Trains a run that is interrupted where ``here`` holds for the arguments of a method's call, then resumes it.

    Returns:
        The results.
    """
    inner = getattr(owner, method)

    def stopping(*args: Any) -> Any:
        if here(*args):
            raise KeyboardInterrupt
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, stopping)
        with pytest.raises(KeyboardInterrupt):
            RUNNERS.build(cfg).train()
    cfg.resume = True
    return RUNNERS.build(cfg).train()


def train_interrupted_in_stage_1(cfg: Config) -> dict[str, Any]:
    """As :func:`train_interrupted`, at the beginning of stage 1's second epoch."""
    return train_interrupted(
        cfg, ResumableTrainLoop, 'run_iter',
        lambda loop, *_: loop.runner.work_dir.endswith('stage_1') and loop._epoch == 1,
    )  # fmt: skip
