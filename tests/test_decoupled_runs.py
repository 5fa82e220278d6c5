# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""DKD, STAR and BARM from stage to stage: what is exported, what STAR keeps of a stage, and resuming it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmseg.apis import init_model
from mmseg.registry import MODELS

from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.export.stock import export_stage
from mmseg_sats.engine.hooks.methods.image_pass import training_images_once
from mmseg_sats.models.prototypes import ReplayPrototypes
from mmseg_sats.protocol import Protocol
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.stage_folder import make_stage
from tests.test_padding import Loading


def test_a_stage_without_a_background_channel_is_exported(tmp_path: Path) -> None:
    folder = make_stage(tmp_path, 'dkd')
    config, checkpoint = export_stage(folder, tmp_path / 'out', safetensors=True)
    weights = load_checkpoint_safely(checkpoint)['state_dict']
    assert not any('auxiliary' in key for key in weights)
    assert not weights['decode_head.conv_seg.weight'][0].any()
    assert type(init_model(str(config), str(checkpoint), device='cpu')).__name__ == 'EncoderDecoder'


def test_a_stage_with_residuals_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'stage_1 cannot be exported: its background is r_0'):
        export_stage(make_stage(tmp_path, 'barm'), tmp_path / 'out')


@HOOKS.register_module()
class Within(Hook):
    """Stops stage 1 after its first iteration, if it is told to."""

    stop = False

    def before_train_iter(self, runner: Runner, **_: Any) -> None:
        if self.stop and runner.work_dir.endswith('stage_1') and runner.iter == 1:
            raise KeyboardInterrupt


def kept(folder: Path) -> dict[str, torch.Tensor]:
    with np.load(folder / 'prototypes.npz', allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def gathered(folder: Path) -> torch.Tensor:
    """The sums of a stage's training images for the weights in its snapshot."""
    cfg = Config.fromfile(folder / 'config.py')
    model = MODELS.build(dict(cfg.model, old_model=None)).eval()
    model.load_state_dict(load_checkpoint_safely(folder / 'snapshot.pth')['state_dict'])
    total = 0
    for batch in Runner.build_dataloader(training_images_once(Loading(cfg)), seed=0):
        data = model.data_preprocessor(batch, False)
        labels = torch.stack([sample.gt_sem_seg.data for sample in data['data_samples']]).squeeze(1).long()
        with torch.no_grad():
            features = ReplayPrototypes.features_of(model, data['inputs'])
        total = total + model.prototypes.sums_of(features, labels)
    return total


def test_star_keeps_the_statistics_of_the_kept_weights_and_is_resumed(
    shapes_cfg: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_default_scope('mmseg')
    cfg = shapes_cfg('star', batch_size=4, protocol='3-3', base=str(tmp_path / 'base.pth'), checkpoint_iters=1)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='Within')]
    cfg.train_dataloader.num_batch_per_epoch = cfg.test_dataloader.num_batch_per_epoch = 2
    protocol = Protocol('3-3', num_classes=6)
    model = MODELS.build(build_stage_config(cfg, protocol, protocol.stages[0], cfg.work_dir).model)
    torch.save(dict(meta={}, state_dict=model.state_dict()), cfg.base)
    monkeypatch.setattr(Within, 'stop', True)
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(cfg).train()
    monkeypatch.undo()
    assert (tmp_path / 'run/stage_1/iter_1.pth').exists()
    cfg.resume = True
    results = RUNNERS.build(cfg).train()
    folders = [tmp_path / f'run/stage_{index}' for index in (0, 1)]
    first, second = (kept(folder) for folder in folders)
    torch.testing.assert_close(first['sums'], gathered(folders[0]))
    new = gathered(folders[1])
    assert new[4:, -3].sum() > 0
    torch.testing.assert_close(second['sums'][4:], new[4:])
    assert torch.equal(second['sums'][1:4], first['sums'][1:])
    assert torch.equal(second['counts'][1:4], first['counts'][1:])
    assert second['present'][-1] > second['present'][:4].sum() > 0
    # Killed between the snapshot and the end of the stage.
    for name in ('done', 'prototypes.npz', 'metrics.json'):
        (folders[1] / name).unlink()
    for path in [*folders[1].glob('epoch_*.pth'), *folders[1].glob('iter_*.pth')]:
        path.unlink()
    weights = load_checkpoint_safely(folders[1] / 'snapshot.pth')['state_dict']
    again = RUNNERS.build(cfg).train()
    assert all(torch.equal(value, second[name]) for name, value in kept(folders[1]).items())
    assert json.dumps(again['final']) == json.dumps(results['final'])
    # Stage 1 without any stop.
    shutil.rmtree(folders[1])
    again = RUNNERS.build(cfg).train()
    found = load_checkpoint_safely(folders[1] / 'snapshot.pth')['state_dict']
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    assert all(torch.equal(value, second[name]) for name, value in kept(folders[1]).items())
    assert json.dumps(again['final']) == json.dumps(results['final'])
