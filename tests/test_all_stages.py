# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""CIT's distillation from the models of all stages: the loss, and who loads and runs these models."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import Tensor

from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.models.losses import AccumulativeDistillationLoss
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors.old_model import OldModel
from mmseg_sats.protocol import Protocol
from tests.small_models import build, images, model_cfg, samples, save_weights
from tests.tensors import random_tensor, value_and_gradient

CHANNELS = (2, 4, 5)
PART = dict(type='AccumulativeDistillationLoss')


def by_loop(student: Tensor, models: list[Tensor]) -> Tensor:
    """BCE of every old channel to the sigmoid of the first model that has it, background's to that of the last."""
    total = 0.0
    batch, _, height, width = student.shape
    for image in range(batch):
        for y in range(height):
            for x in range(width):
                for c in range(models[-1].shape[1]):
                    first = models[-1] if c == 0 else next(m for m in models if m.shape[1] > c)
                    old = 1 / (1 + math.exp(-first[image, c, y, x].item()))
                    new = student[image, c, y, x].sigmoid()
                    total -= old * new.log() + (1 - old) * (1 - new).log()
    return total / (batch * height * width)


def outputs(*channels: int) -> list[SegmentorOutput]:
    return [SegmentorOutput(random_tensor(2, k, 3, 2, seed=k) / 2, ()) for k in channels]


@pytest.mark.parametrize('channels', [CHANNELS, CHANNELS[1:], CHANNELS[2:]])
def test_is_the_formula(channels: tuple[int, ...]) -> None:
    *earlier, teacher = outputs(*channels)
    teacher.earlier = tuple(earlier)
    student = SegmentorOutput((random_tensor(2, 7, 3, 2) / 2).requires_grad_(), ())
    loss = AccumulativeDistillationLoss(loss_weight=3.0)
    value, gradient = value_and_gradient(loss(student, teacher, torch.zeros(2, 3, 2).long()), student.logits)
    models = [output.logits for output in (*earlier, teacher)]
    expected = value_and_gradient(3 * by_loop(student.logits, models), student.logits)
    assert value == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-12)
    assert gradient[:, 5:].abs().max() == 0


def test_what_the_last_model_forgot_is_learned_from_the_first() -> None:
    first, last = outputs(3, 4)
    forgot = SegmentorOutput(last.logits.clone(), ())
    forgot.logits[:, 1] = -20
    forgot.earlier = (first,)
    student = SegmentorOutput(torch.zeros(2, 5, 3, 2, dtype=torch.float64, requires_grad=True), ())
    _, gradient = value_and_gradient(
        AccumulativeDistillationLoss()(student, forgot, torch.zeros(2, 3, 2).long()), student.logits
    )
    torch.testing.assert_close(gradient[:, 1] * 12, 0.5 - first.logits[:, 1].sigmoid())


@pytest.fixture(scope='module')
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('run')
    return [
        dict(checkpoint=save_weights(build(model_cfg(k), seed=k), folder / f'{k}.pth'), num_old=k) for k in CHANNELS
    ]


def test_a_segmentor_runs_the_models_of_all_stages(snapshots: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    *earlier, old = snapshots
    model = build(model_cfg(7, old_model=dict(old, earlier=earlier), distillation=dict(output=PART))).train()
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    losses = model.loss(images(), samples(labels))
    models = [OldModel(build(model_cfg(own['num_old']), seed=own['num_old'])) for own in snapshots]
    *before, teacher = (own(images()) for own in models)
    teacher.earlier = tuple(before)
    student = SegmentorOutput(model.decode_head(model.backbone(images())), ())
    expected = AccumulativeDistillationLoss()(student, teacher, labels)
    torch.testing.assert_close(losses['loss_output'], expected, rtol=1e-5, atol=1e-6)
    assert not any('old' in key or 'earlier' in key for key in model.state_dict())
    assert len(list(model.parameters())) == len(list(build(model_cfg(7)).parameters()))
    assert all(not own.model.training for own in model.old_model.earlier)


def test_nothing_is_read_unless_a_part_asks(snapshots: list[dict]) -> None:
    parts = dict(output=dict(type='SigmoidDistillationLoss'))
    model = build(model_cfg(7, old_model=snapshots[-1], distillation=parts)).train()
    model.loss(images(), samples(torch.zeros(2, 64, 64, dtype=torch.long)))
    assert model.old_model.earlier == ()
    with pytest.raises(ValueError, match=r'distillation output needs the models of all stages'):
        build(model_cfg(7, old_model=snapshots[-1], distillation=dict(output=PART)))


def test_a_stages_config_names_the_snapshots_for_parts_that_ask(shapes_cfg: Callable[..., Config]) -> None:
    protocol = Protocol('3-1', num_classes=6)
    for method in ('cit', 'lwf_mc'):
        cfg = shapes_cfg(method)
        stages = [build_stage_config(cfg, protocol, stage, cfg.work_dir) for stage in protocol.stages]
        assert stages[0].model.get('old_model') is None
        for index, stage in enumerate(stages[1:], start=1):
            old = stage.model.old_model
            assert (Path(old.checkpoint).parent.name, old.num_old) == (f'stage_{index - 1}', 3 + index)
            named = [(Path(own.checkpoint).parent.name, own.num_old) for own in old.get('earlier', ())]
            assert named == [(f'stage_{k}', 4 + k) for k in range(index - 1)] * (method == 'cit')
            assert ('earlier' in old) == (method == 'cit')
