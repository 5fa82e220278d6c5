# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL and SDR through all stages: what is frozen, what is carried on, what is served."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from torch import nn

from mmseg_sats.engine.config.replay import keep_exemplars
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.hooks import PrototypeHook
from mmseg_sats.models import ClassPrototypes
from mmseg_sats.protocol import UNKNOWN_LABEL, Protocol
from tests.runs import logged, same, weights

PROTOCOL = Protocol('3-1', num_classes=6)
MakeConfig = Callable[..., Config]
CLASSIFIER = 'decode_head.conv_seg'


@HOOKS.register_module()
class SeePrototypes(Hook):
    """Writes down the prototypes that each epoch begins with, and can interrupt stage 1."""

    priority = 'LOWEST'
    begun: list[tuple[str, int, dict]] = []
    # Not in the config: a resumed run must have the same one.
    stop = False

    def before_train_epoch(self, runner: Runner) -> None:
        stage = Path(runner.work_dir).name
        self.begun.append((stage, runner.epoch, runner.model.prototypes.state_dict()))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if self.stop and runner.work_dir.endswith('stage_1') and runner.epoch == 1:
            raise KeyboardInterrupt


def small(make: MakeConfig, method: str, **options: Any) -> Config:
    """Two iterations a stage, each logged."""
    init_default_scope('mmseg')
    cfg = make(method, batch_size=4, **options)
    cfg.train_dataloader.num_batch_per_epoch = 2
    cfg.test_dataloader.num_batch_per_epoch = 2
    cfg.default_hooks.logger.interval = 1
    return cfg


def prototypes_of(folder: Path) -> dict[str, torch.Tensor]:
    with np.load(folder / 'prototypes.npz', allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_ssul_trains_nothing_but_its_classifiers(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    results = RUNNERS.build(small(shapes_cfg, 'ssul')).train()
    assert len(results['stages']) == 4
    states = [weights(tmp_path / f'run/stage_{k}/snapshot.pth') for k in range(4)]
    for index, (old, new) in enumerate(pairwise(states)):
        assert old.keys() == new.keys()
        moved = {key for key in old if 'conv_seg' not in key and not torch.equal(old[key], new[key])}
        assert not moved
        num_old = 4 + index
        for kind in ('weight', 'bias'):
            rows = new[f'{CLASSIFIER}.{kind}']
            assert rows.shape[0] == num_old + 1
            assert torch.equal(rows[1:num_old], old[f'{CLASSIFIER}.{kind}'][1:])
            # The new row began as the unknown class and went its own way.
            assert not torch.equal(rows[num_old:], old[f'{CLASSIFIER}.unknown.{kind}'])
            assert not torch.equal(new[f'{CLASSIFIER}.unknown.{kind}'], old[f'{CLASSIFIER}.unknown.{kind}'])
    for index in range(4):
        iterations = logged(tmp_path / f'run/stage_{index}')
        assert len(iterations) == 2
        assert all(math.isfinite(line['loss']) and line['loss'] > 0 for line in iterations)
        assert all('decode.loss_bce' in line for line in iterations)
    _serves_classes_only(tmp_path / 'run/stage_1', shapes_cfg)


def _serves_classes_only(folder: Path, shapes_cfg: MakeConfig) -> None:
    model = init_model(str(folder / 'config.py'), str(folder / 'snapshot.pth'), device='cpu')
    image = next(Path(shapes_cfg('ssul').data_root).rglob('val/images/*'))
    result = inference_model(model, str(image))
    assert result.seg_logits.data.shape[0] == len(model.dataset_meta['classes']) == 5
    assert result.pred_sem_seg.data.max() < 5


@pytest.mark.parametrize('saliency', ['spectral_residual', 'everything'])
def test_ssuls_training_labels_have_unknown_pixels(shapes_cfg: MakeConfig, saliency: str) -> None:
    cfg = small(shapes_cfg, 'ssul', saliency=saliency)
    stage = build_stage_config(cfg, PROTOCOL, PROTOCOL.stages[1], cfg.work_dir)
    loader = Runner.build_dataloader(stage.train_dataloader)
    labels = [sample.gt_sem_seg.data for batch in loader for sample in batch['data_samples']]
    present = set(torch.cat(labels).unique().tolist())
    assert present == ({4, UNKNOWN_LABEL} if saliency == 'everything' else {0, 4, UNKNOWN_LABEL})


def test_sdr_learns_in_every_stage(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = small(shapes_cfg, 'sdr')
    assert len(RUNNERS.build(cfg).train()['stages']) == 4
    for index in range(4):
        iterations = logged(tmp_path / f'run/stage_{index}')
        assert len(iterations) == 2
        parts = {f'loss_{name}' for name in cfg.distillation} if index else {'loss_sparsity'}
        for line in iterations:
            assert {name for name in line if name.startswith('loss_')} == parts
            assert all(math.isfinite(value) for value in line.values())
        state = prototypes_of(tmp_path / f'run/stage_{index}')
        assert state['sums'].shape[0] == state['counts'].shape[0] == 4 + index
        assert state['counts'][0] == 0
        snapshot = weights(tmp_path / f'run/stage_{index}/snapshot.pth')
        assert not any('prototype' in key for key in snapshot)
        if index:
            before = prototypes_of(tmp_path / f'run/stage_{index - 1}')
            assert (state['counts'][:-1] == before['counts']).all()
            assert same({'sums': state['sums'][:-1]}, {'sums': before['sums']})
    assert state['counts'].sum() > 0


def test_a_resumed_sdr_run_goes_on_with_its_prototypes(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    SeePrototypes.begun.clear()
    cfg = small(shapes_cfg, 'sdr', epochs=2, protocol='3-3')
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='SeePrototypes')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeePrototypes, 'stop', True)
        with pytest.raises(KeyboardInterrupt):
            RUNNERS.build(cfg).train()
    *_, (stage, epoch, interrupted) = SeePrototypes.begun
    assert (stage, epoch) == ('stage_1', 1)
    assert interrupted['counts'].sum() > prototypes_of(tmp_path / 'run/stage_0')['counts'].sum()
    SeePrototypes.begun.clear()
    cfg.resume = True
    RUNNERS.build(cfg).train()
    ((stage, epoch, resumed),) = SeePrototypes.begun
    assert (stage, epoch) == ('stage_1', 1)
    assert same(interrupted, resumed)


def test_a_stage_from_a_checkpoint_gets_its_prototypes(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = small(shapes_cfg, 'sdr', protocol='3-3', base=str(tmp_path / 'base.pth'))
    model = MODELS.build(build_stage_config(cfg, PROTOCOL, PROTOCOL.stages[0], cfg.work_dir).model)
    torch.save(dict(meta={}, state_dict=model.state_dict()), cfg.base)
    RUNNERS.build(cfg).train()
    first, second = (prototypes_of(tmp_path / f'run/stage_{index}') for index in (0, 1))
    assert first['counts'].shape == (4,)
    assert first['counts'][1:].sum() > 0
    assert (second['counts'][:4] == first['counts']).all()
    assert same({'sums': second['sums'][:4]}, {'sums': first['sums']})


def begin(tmp_path: Path) -> None:
    """Stage 1 of a run whose stage 0 lies in ``tmp_path``."""
    model = nn.Module()
    model.prototypes = ClassPrototypes(4)
    cfg = Config(dict(model=dict(old_model=dict(checkpoint=str(tmp_path / 'snapshot.pth')))))
    PrototypeHook().before_train(SimpleNamespace(model=model, cfg=cfg))


def test_missing_or_broken_prototypes_are_named(tmp_path: Path) -> None:
    path = tmp_path / 'prototypes.npz'
    with pytest.raises(FileNotFoundError, match=r'prototypes.npz does not exist: the previous'):
        begin(tmp_path)
    path.write_bytes(b'PK nothing')
    with pytest.raises(ValueError, match=r'prototypes.npz does not hold prototypes'):
        begin(tmp_path)
    np.savez(path, sums=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r'prototypes.npz does not hold prototypes'):
        begin(tmp_path)
    np.savez(path, sums=np.array([object()]), counts=np.zeros(3))
    with pytest.raises(ValueError, match=r'prototypes.npz does not hold prototypes.*pickle'):
        begin(tmp_path)


@pytest.mark.parametrize('method', ['ssul', 'sdr'])
def test_with_a_memory(method: str, shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = small(shapes_cfg, method, protocol='3-3', memory=6)
    RUNNERS.build(cfg).train()
    for line in logged(tmp_path / 'run/stage_1'):
        assert math.isfinite(line['loss'])
        assert line['loss'] > 0


def test_ssuls_exemplars_have_true_labels_and_unknown_pixels(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    """Nothing is shifted by a channel; what is salient beside the seen classes is unknown."""
    cfg = small(shapes_cfg, 'ssul', memory=6, saliency='everything')
    first, second = (build_stage_config(cfg, PROTOCOL, PROTOCOL.stages[k], cfg.work_dir) for k in (0, 1))
    folder = tmp_path / 'run/stage_0'
    folder.mkdir(parents=True)
    keep_exemplars(first, PROTOCOL.stages[0], folder, folder)
    dataset = DATASETS.build(second.train_dataloader.dataset)
    assert set(dataset.parts) == {'stage', 'memory'}
    memory = dataset.parts['memory']
    for index in range(len(memory)):
        info = memory.get_data_info(index)
        mask = torch.from_numpy(np.array(Image.open(info['seg_map_path'])).astype(int))
        labels = memory[index]['data_samples'].gt_sem_seg.data[0]
        expected = torch.where((mask > 4) & (mask < 255), 0, mask)
        expected[expected == 0] = UNKNOWN_LABEL
        assert sorted(labels.flatten().tolist()) == sorted(expected.flatten().tolist())
