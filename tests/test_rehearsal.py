# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The rehearsal before a run: what it finds, where nothing was trained yet, and that it leaves no trace."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, RUNNERS
from mmengine.visualization import Visualizer
from mmseg.registry import MODELS, TASK_UTILS
from PIL import Image
from torch import nn

from mmseg_sats.datasets.memory.selection import ClassBalancedMemory
from mmseg_sats.engine.checks import rehearsal
from mmseg_sats.engine.checks.rehearsal import RehearsalError, largest_and_smallest
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.test_bad_input import CONFIG, draw
from tools.train_incremental import main

ROOT = Path(__file__).parents[1]


@MODELS.register_module()
class FailsWithFiveChannels(nn.Module):
    """A part of the distillation that works until the second class is added."""

    def forward(self, student: object, teacher: object, labels: torch.Tensor) -> torch.Tensor:
        """Fails in the third stage of 3-1."""
        if student.logits.shape[1] > 5:
            raise IndexError('index 5 is out of bounds')
        return student.logits.sum() * 0


@HOOKS.register_module()
class SavesAFunction(Hook):
    """Writes a checkpoint that cannot be read without running code."""

    def before_save_checkpoint(self, runner: object, checkpoint: dict) -> None:
        """Adds a function."""
        checkpoint['mine'] = print


@HOOKS.register_module()
class FailsAfterTheStage(Hook):
    """A hook of the user's that is called once the stage is evaluated."""

    def after_stage(self, runner: object, stage: object, metrics: dict) -> None:
        """Asks for a metric that does not exist."""
        metrics['mIoU_olds']


@TASK_UTILS.register_module()
class PicksNothingThatExists(ClassBalancedMemory):
    """A memory that fails when it is asked the first time."""

    def select(self, candidates: object, stage: int) -> object:
        """Fails."""
        raise KeyError('herding')


def tiny(data: Path, name: str, size: tuple[int, int]) -> None:
    """Gives one evaluation image another size (height, width)."""
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2] = 1
    Image.fromarray(mask).save(data / f'masks/{name}.png')
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(data / f'images/{name}.png')
    (data / 'val.txt').write_text(''.join(f'{number}\n' for number in [*range(8), int(name)]))


class Case(NamedTuple):
    """What the config says besides, what the message says, and what is done to the data."""

    config: str
    message: str
    spoil: Callable[[Path], object] = lambda data: None


LOAD, LABELS, PACK = (dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs'))
RESIZE = dict(type='Resize', scale=(64, 64), keep_ratio=False)
CASES = {
    'labels resized': Case(
        f'test_pipeline = {[LOAD, LABELS, RESIZE, PACK]}',
        r'stage 0 would fail in evaluation: .*images/\d+\.png: prediction has shape \(32, 32\), its label \(64, 64\): '
        r'expected LoadAnnotations behind Resize',
    ),
    'no labels': Case(
        f'test_pipeline = {[LOAD, RESIZE, PACK]}',
        r'stage 0 would fail in evaluation: .*\.png has no label: expected LoadAnnotations in the transforms of the '
        r'evaluation, behind Resize',
    ),
    'two sizes in a batch': Case(
        'test_dataloader = dict(batch_size=2)',
        r'stage 0 would fail in evaluation: .*several sizes: expected test_dataloader.batch_size=1',
        lambda data: tiny(data, '9', (40, 48)),
    ),
    'a tiny image': Case(
        '', r'stage 0 would fail in evaluation: .*16 x 8.*', lambda data: tiny(data, '9', (8, 16))
    ),
    'a loss that fails in a later stage': Case(
        "distillation = dict(mine=dict(type='FailsWithFiveChannels'))",
        r'stage 2 would fail in training: IndexError: index 5 is out of bounds',
    ),
    'a checkpoint that runs code': Case(
        "custom_hooks = [dict(type='SavesAFunction')]",
        r'stage 0 would fail in training: ValueError: .*epoch_1\.pth',
    ),
    'a hook at the end of a stage': Case(
        "custom_hooks = [dict(type='FailsAfterTheStage')]",
        r'stage 0 would fail in the end of the stage: KeyError: mIoU_olds',
    ),
    'a memory that fails': Case(
        "memory = 6\nmemory_selection = dict(type='PicksNothingThatExists')",
        r'stage 0 would fail in the choice of exemplars: KeyError: herding',
    ),
    'weights for some classes': Case(
        'segmentation_loss = dict(class_weight=[1.0, 2.0, 3.0, 4.0])', r'.*'
    ),
}  # fmt: skip


@pytest.fixture(scope='module')
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('rehearsal') / 'data'
    draw(folder)
    return folder


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config over own images: three stages, the evaluation of which sees eight of them."""

    def write(text: str = '', spoil: Callable[[Path], object] = lambda data: None) -> Path:
        data = shutil.copytree(drawn, tmp_path / 'data')
        spoil(data)
        path = tmp_path / 'own.py'
        base = CONFIG.replace("protocol = '3-1'", "protocol = '2-2'").replace('rehearsal = None', 'rehearsal = dict()')
        path.write_text(f'{base.format(configs=ROOT / "configs", data=data)}report = None\n{text}\n')
        return path

    return write


@pytest.mark.parametrize('case', [pytest.param(case, id=name) for name, case in CASES.items()])
def test_what_fails_later_fails_before_training(
    case: Case, own: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ['train', str(own(case.config, case.spoil)), '--work-dir', str(tmp_path / 'run')]
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit, match=case.message) as stopped:
        main()
    assert '\n' not in str(stopped.value).strip()
    left = [path.name for path in (tmp_path / 'run').glob('*')]
    assert left in ([], [rehearsal.LOG])
