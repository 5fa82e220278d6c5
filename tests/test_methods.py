# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Every method of configs/ learns: two iterations of every stage, on drawn images and on photographs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmseg.registry import MODELS

from tests.runs import logged
from tests.shared import shared_path

CONFIGS = Path(__file__).parents[1] / 'configs'
METHODS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != '_base_')
# Joint training has no old images; C-RLS computes a classifier of all images, and trains stage 0 alone.
WITHOUT_MEMORY, TRAINED_ONCE = {'joint', 'crls'}, {'crls'}
RUNS = [(method, memory) for method in METHODS for memory in (False, True) if not (memory and method in WITHOUT_MEMORY)]
RUN_NAMES = [f'{method}_m' if memory else method for method, memory in RUNS]


def two_iterations_a_stage(cfg: Config, epochs: int = 1) -> dict[str, Any]:
    """The results of a run so short, of one epoch or of two."""
    cfg.epochs = epochs
    cfg.train_dataloader.num_batch_per_epoch = 2 // epochs
    cfg.test_dataloader.num_batch_per_epoch = 2
    cfg.default_hooks.logger.interval = 1
    return RUNNERS.build(cfg).train()


def parts_of(folder: Path, stage: int) -> set[str]:
    """Names of the losses beside the heads' that a stage's config has and computes; most need an old model."""
    init_default_scope('mmseg')
    own = Config.fromfile(folder / 'config.py').model.distillation
    parts = {name: MODELS.build(part) for name, part in own.items() if part is not None}
    return {
        f'loss_{name}' for name, part in parts.items() if stage or not getattr(part, 'needs_teacher', True)
    }


def check_stage(stage: int, folder: Path) -> None:
    iterations, parts = logged(folder), parts_of(folder, stage)
    assert len(iterations) == 2
    for losses in iterations:
        assert {name for name in losses if name.startswith('loss_')} == parts
        assert all(math.isfinite(value) for value in losses.values())
        assert losses['loss'] > 0
    # In a stage's first step the features are still the old model's.
    assert not parts or any(iterations[1][name] != 0 for name in parts)


def check_exemplars(folder: Path, budget: int, num_classes: int) -> None:
    exemplars = json.loads((folder / 'exemplars.json').read_text())['exemplars']
    assert len(exemplars) <= budget
    assert bool(exemplars) == bool(budget)
    if budget:
        assert len({item['stands_for'] for item in exemplars}) == num_classes


@pytest.mark.parametrize('method', METHODS)
def test_two_iterations_of_every_stage(method: str, shapes_cfg: Callable[..., Config], tmp_path: Path) -> None:
    """Without memory, and with one on the same stage 0."""
    for budget in (0,) if method in WITHOUT_MEMORY else (0, 6):
        run = tmp_path / f'memory_{budget}'
        cfg = shapes_cfg(method, run.name, batch_size=4, memory=budget)
        if cfg.protocol != 'joint':
            # Without memory, the fewest stages that hold a second later one.
            cfg.protocol = '4-2' if budget else '4-1'
        if budget:
            cfg.base = str(tmp_path / 'memory_0/stage_0/snapshot.pth')
        stages = two_iterations_a_stage(cfg)['stages']
        assert len(stages) == dict(zip(('joint', '4-2', '4-1'), (1, 2, 3), strict=True))[cfg.protocol]
        for stage in range(1 if method in TRAINED_ONCE else len(stages)):
            if stage or not budget:
                check_stage(stage, run / f'stage_{stage}')
            if len(stages) > 1:
                check_exemplars(run / f'stage_{stage}', budget, 4 + stage * (2 if budget else 1))


@pytest.mark.slow
@pytest.mark.parametrize(('method', 'memory'), RUNS, ids=RUN_NAMES)
def test_two_iterations_of_every_stage_on_photographs(
    method: str, memory: bool, tmp_path: Path
) -> None:
    suffix = '_m' if memory else ''
    cfg = Config.fromfile(CONFIGS / method / f'segformer_b0_voc_mini_15-1{suffix}.py')
    data_root = shared_path('data/voc_mini')
    if 'outside_root' in cfg:
        cfg.outside_root = str(data_root / 'JPEGImages')
    cfg.merge_from_dict(dict(
        data_root=str(data_root), train_list='ImageSets/Segmentation/smoke.txt',
        work_dir=str(tmp_path / 'run'), pretrained=None, crop_size=96,
        batch_size=4 if memory and 'outside_root' in cfg else 2,  # a place for each source
        num_workers=0, persistent_workers=False))
    # Some stages of the list have three images: one whole batch.
    results = two_iterations_a_stage(cfg, epochs=2)
    assert results['dataset'] == 'voc_mini'
    assert len(results['stages']) == (1 if cfg.protocol == 'joint' else 6)
    for stage in range(1 if method in TRAINED_ONCE else len(results['stages'])):
        check_stage(stage, tmp_path / f'run/stage_{stage}')
