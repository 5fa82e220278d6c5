# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""BARM: background lowered by residuals, in the classifier and from stage to stage; its losses against loops."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmseg_sats.engine.export import stock
from mmseg_sats.functional.features.background_residual import (
    background_residual,
    output_distillation,
)
from mmseg_sats.functional.features.prototype_replay import masked_feature_mse
from mmseg_sats.models.heads.residual_classifier import ResidualClassifier
from tests.small_models import build, images, model_cfg, samples, save_weights
from tests.tensors import random_labels, random_tensor, value_and_gradient

CONV_SEG = 'decode_head.conv_seg'
PARTS = dict(
    residual=dict(type='BackgroundResidualLoss'),
    features=dict(type='BackgroundFeatureLoss'),
    output=dict(type='OldOutputDistillationLoss'),
)


def test_background_is_the_first_rows_logit_less_what_the_residuals_take() -> None:
    classifier = ResidualClassifier(4, 5, 4, residuals=2).double()
    x = random_tensor(2, 4, 3, 3)
    weight, bias = classifier.rows()
    raw = torch.einsum('kc,bchw->bkhw', weight.flatten(1), x) + bias[:, None, None]
    residual = classifier.residual(x)
    for training in (False, True):
        found = classifier.train(training)(x)
        torch.testing.assert_close(found[:, 1:], raw[:, 1:])
        for i, y, z in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
            first, last = residual[i, :, y, z]
            expected = raw[i, 0, y, z] + min(first, 0 * first) + (last if training else min(last, 0 * last))
            torch.testing.assert_close(found[i, 0, y, z], expected)
    assert (residual > 0).any()
    gradients = torch.autograd.grad(
        classifier(x)[:, 0].sum(), (classifier.background.weight, classifier.residual.weight), allow_unused=True
    )
    assert gradients[0] is None or not gradients[0].any()
    assert not gradients[1][0].any()
    assert gradients[1][1].any()


def stage_cfg(num_classes: int, **options: Any) -> dict[str, Any]:
    cfg = model_cfg(num_classes, classifier_init='random', **options)
    cfg['decode_head']['loss_decode'] = dict(type='OneVsRestLoss', num_old=num_classes - 1)
    return cfg


def stages(tmp_path: Path) -> list[nn.Module]:
    """Models of 3, 4 and 5 channels as the stages begin, with random weights where the stage adds some."""
    models = [build(stage_cfg(3))]
    for index in (1, 2):
        path = save_weights(models[-1], tmp_path / f'{index}.pth')
        old_model = dict(checkpoint=path, num_old=2 + index)
        cfg = stage_cfg(3 + index, old_model=old_model, background_residuals=index, distillation=PARTS)
        models.append(build(cfg, seed=index))
        load_checkpoint(models[-1], path)
    return models


def test_a_stage_begins_with_the_earlier_residuals_and_can_only_lower_background(tmp_path: Path) -> None:
    models = stages(tmp_path)
    logits = []
    for model in models:
        with torch.no_grad():
            logits.append(model.eval()(images(), mode='tensor'))
    for index, (old, new) in enumerate(pairwise(logits)):
        torch.testing.assert_close(new[:, 1 : 3 + index], old[:, 1:])
        assert (new[:, 0] <= old[:, 0] + 1e-6).all()
        assert (new[:, 0] < old[:, 0] - 1e-3).any()
    first, second = (model.state_dict()[f'{CONV_SEG}.residual.weight'] for model in models[1:])
    assert torch.equal(second[:1], first)
    teacher = models[2].old_model(images())
    torch.testing.assert_close(teacher.logits, logits[1], rtol=0, atol=1e-5)


def test_a_step_trains_this_stages_residual_with_the_labels(tmp_path: Path) -> None:
    model = stages(tmp_path)[2].train()
    labels = torch.full((2, 64, 64), 4)
    labels[:, 30:], labels[:, 50:] = 0, 2
    losses = model.loss(images(), samples(labels))
    assert {'loss_residual', 'loss_features', 'loss_output', 'decode.loss_bce'} <= set(losses)
    # The features of the old model in eval are not those of the student in train.
    assert all(float(losses[f'loss_{name}']) > 0 for name in PARTS)
    rows = model.decode_head.conv_seg.residual.weight
    (gradient,) = torch.autograd.grad(losses['decode.loss_bce'], rows, retain_graph=True)
    assert not gradient[0].any()
    assert gradient[1].any()
    (gradient,) = torch.autograd.grad(losses['loss_output'], rows)
    assert gradient[0].any()
    assert not gradient[1].any()


def test_the_residuals_losses_are_the_formulas() -> None:
    residual, labels = random_tensor(2, 3, 4).requires_grad_(), random_labels(2, 3, 4, classes=5)
    low, high, numbers = 0.0, 0.0, [0, 0]
    for i, y, x in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        label, s = int(labels[i, y, x]), residual[i, y, x].sigmoid()
        if label < 3:
            low, numbers[0] = low + torch.relu((s - 1) ** 2 - s**2), numbers[0] + 1
        elif label != 255:
            high, numbers[1] = high - (1 - s).log(), numbers[1] + 1
    for index, total in enumerate((low, high)):
        value, gradient = value_and_gradient(background_residual(residual, labels, 3)[index], residual)
        expected, by_loop = value_and_gradient(total / numbers[index], residual)
        assert value == pytest.approx(expected)
        torch.testing.assert_close(gradient, by_loop)
    nothing = background_residual(residual, torch.full_like(labels, 255), 3)
    assert [value.item() for value in nothing] == [0, 0]


def test_old_outputs_are_distilled_by_the_formula() -> None:
    new, old = random_tensor(2, 3, 2, 2).requires_grad_(), random_tensor(2, 3, 2, 2, seed=1)
    total = 0.0
    for x, q in zip(new.flatten(), old.sigmoid().flatten().tolist(), strict=True):
        total = total - (q * x.sigmoid().log() + (1 - q) * (-x).sigmoid().log()) / 8
    value, gradient = value_and_gradient(output_distillation(new, old), new)
    expected, by_loop = value_and_gradient(total, new)
    assert value == pytest.approx(expected)
    torch.testing.assert_close(gradient, by_loop)
    with pytest.raises(ValueError, match='same outputs'):
        output_distillation(new, old[:, :2])


def test_features_of_background_are_a_mean_over_all_positions() -> None:
    new, old = random_tensor(1, 2, 2, 2), random_tensor(1, 2, 2, 2, seed=1)
    where = torch.tensor([[[True, False], [False, False]]])
    expected: Tensor = (new[0, :, 0, 0] - old[0, :, 0, 0]).square().sum() / 8
    torch.testing.assert_close(masked_feature_mse(new, old, where, over_all=True), expected)


def test_it_cannot_be_exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = SimpleNamespace(model=dict(background_residuals=2)), None
    monkeypatch.setattr(stock, 'load_for_export', lambda _: loaded)
    with pytest.raises(ValueError, match=r'cannot be exported: its background is .* with 2 residuals'):
        stock.export_stage(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(background_residuals=-1), r"background_residuals=-1: expected '\$stage'"),
        (dict(background_residuals=1, unknown=True), r'unknown=True and background_residuals=1 do not go together'),
        (dict(distillation=PARTS, old_model=dict(checkpoint='', num_old=2)), r'asks for residuals of background'),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model_cfg(3, classifier_init='unknown' if options.get('unknown') else 'random', **options))
