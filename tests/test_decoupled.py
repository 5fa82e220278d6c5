# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Sigmoids without a background channel: losses against loops from their formulas, and background as a constant."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmseg_sats.engine.export.stock import check_same_logits
from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.functional import (
    decomposed_distillation,
    sigmoid_cross_entropy,
    sigmoid_distillation,
)
from mmseg_sats.functional.features.decomposed import decomposed_logits
from mmseg_sats.models.heads.classifier_form import is_of_one_method
from mmseg_sats.models.heads.linear_classifier import seen_classifier
from mmseg_sats.models.heads.split_classifier import SplitClassifier
from mmseg_sats.models.losses import SigmoidCrossEntropyLoss, SigmoidDistillationLoss
from tests.small_models import auxiliary_head_cfg, build, images, model_cfg, samples, save_weights
from tests.tensors import Output, random_labels, random_tensor, value_and_gradient

NUM_OLD, NUM_NEW = 3, 5
CONV_SEG = 'decode_head.conv_seg'


def bce(x: Tensor, target: float, weight: float = 1.0) -> Tensor:
    return -weight * target * x.sigmoid().log() - (1 - target) * (-x).sigmoid().log()


def cross_entropy_by_loop(
    logits: Tensor, labels: Tensor, num_old: int, background: bool, pos_weight: float
) -> Tensor:
    total = 0 * logits.sum()
    for image, row, column in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        label = int(labels[image, row, column])
        for c, x in enumerate(logits[image, :, row, column]):
            if label != 255 and (c >= num_old or (background and c == 0)):
                total = total + bce(x, float(c == label), pos_weight)
    return total / labels.numel()


@pytest.mark.parametrize(
    ('num_old', 'background', 'pos_weight'), [(1, True, 1.0), (1, False, 2.0), (3, False, 4.0), (3, True, 0.5)]
)
def test_cross_entropy_of_the_trained_channels(num_old: int, background: bool, pos_weight: float) -> None:
    options = dict(num_old=num_old, background=background, pos_weight=pos_weight)
    logits, labels = random_tensor(2, 5, 3, 4).requires_grad_(), random_labels(2, 3, 4, classes=5)
    labels[0, 0, :2] = torch.tensor([255, 1])
    value, gradient = value_and_gradient(sigmoid_cross_entropy(logits, labels, **options), logits)
    expected, by_loop = value_and_gradient(cross_entropy_by_loop(logits, labels, **options), logits)
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, by_loop, rtol=0, atol=1e-12)
    assert SigmoidCrossEntropyLoss(2.0, **options)(logits, labels).item() == pytest.approx(2 * expected)
    left_out = [c for c in range(5) if 0 < c < num_old or (c == 0 and not background)]
    assert not gradient[:, left_out].any()


@pytest.mark.parametrize('background', [True, False])
def test_distillation_of_the_old_classes(background: bool) -> None:
    student, teacher = random_tensor(2, 5, 2, 3).requires_grad_(), random_tensor(2, 3, 2, 3, seed=1)
    expected = 0 * student.sum()
    for c in range(0 if background else 1, 3):
        for x, old in zip(student[:, c].flatten(), teacher[:, c].flatten(), strict=True):
            expected = expected + bce(x, float(old.sigmoid())) / 12
    value, gradient = value_and_gradient(sigmoid_distillation(student, teacher, background=background), student)
    expected, by_loop = value_and_gradient(expected, student)
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, by_loop, rtol=0, atol=1e-12)
    module = SigmoidDistillationLoss(5.0, background)
    loss = module(Output(student), Output(teacher), torch.zeros(2, 2, 3).long())
    assert loss.item() == pytest.approx(5 * expected)


def test_decomposed_distillation_is_the_formula() -> None:
    features, old_features = random_tensor(2, 4, 2, 3).requires_grad_(), random_tensor(2, 4, 2, 3, seed=1)
    weight, old_weight = random_tensor(3, 4, seed=2).requires_grad_(), random_tensor(3, 4, seed=3)
    expected = 0.0
    for image, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        f, old = features[image, :, row, column], old_features[image, :, row, column]
        for w, old_w in zip(weight, old_weight, strict=True):
            for sign in (1, -1):
                x = sum(a * b for a, b in zip(w, f, strict=True) if sign * a > 0)
                target = sum(a * b for a, b in zip(old_w, old, strict=True) if sign * a > 0)
                expected = expected + bce(x, float(torch.as_tensor(target).sigmoid())) / 12
    loss = decomposed_distillation(features, weight, old_features, old_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for inputs in (features, weight):
        one, other = (torch.autograd.grad(value, inputs, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_it_holds_the_terms_where_the_logit_alone_lets_them_go() -> None:
    """Two features with the same logit: the distillation of the logit has no gradient, that of its terms has one."""
    weight = torch.tensor([[1.0, -1.0]]).double()
    old, new = (torch.tensor(f).double().view(1, 2, 1, 1) for f in ([1.0, 0.5], [3.0, 2.5]))
    new.requires_grad_()
    positive, negative = decomposed_logits(new, weight)
    torch.testing.assert_close(positive + negative, new[:, :1] - new[:, 1:])
    logits = (new[:, :1] - new[:, 1:]).expand(1, 2, 1, 1)
    _, gradient = value_and_gradient(sigmoid_distillation(logits, logits.detach()), new)
    assert gradient.abs().max() < 1e-15
    _, gradient = value_and_gradient(decomposed_distillation(new, weight, old, weight), new)
    assert gradient.flatten()[0] > 0.1
    assert decomposed_distillation(old.half(), weight.half(), old, weight).dtype == torch.float32
    with pytest.raises(ValueError, match=r'the same for both models, got \(1, 2, 1, 1\) and \(1, 2\)'):
        decomposed_distillation(new, weight, old, weight[:, :1])


# Background as a constant


def dkd_cfg(num_classes: int, **options: Any) -> dict[str, Any]:
    num_old = NUM_OLD if 'old_model' in options else 1
    loss = dict(type='SigmoidCrossEntropyLoss', num_old=num_old, background=False)
    distillation = dict(
        output=dict(type='SigmoidDistillationLoss', background=False),
        decomposed=dict(type='DecomposedDistillationLoss'),
        auxiliary=dict(type='AuxiliaryClassifierLoss'),
    )
    defaults = dict(
        background_logit=0.0, classifier_init='auxiliary', distillation=distillation,
        auxiliary_head=dict(auxiliary_head_cfg(num_classes), loss_decode=dict(loss, loss_weight=0.4)),
    )  # fmt: skip
    cfg = model_cfg(num_classes, **defaults | options)
    cfg['decode_head']['loss_decode'] = loss
    return cfg


def later_stage(tmp_path: Path, **options: Any) -> tuple[nn.Module, nn.Module]:
    old = build(dkd_cfg(NUM_OLD))
    path = save_weights(old, tmp_path / 'old.pth')
    new = build(dkd_cfg(NUM_NEW, old_model=dict(checkpoint=path, num_old=NUM_OLD), **options), seed=1)
    load_checkpoint(new, path)
    return old, new


def labels(first: int = NUM_OLD) -> Tensor:
    found = torch.randint(first, NUM_NEW, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    return found.masked_fill(torch.arange(64) < 30, 0)


def train(model: nn.Module, optimizer: dict[str, Any], steps: int = 2) -> list[dict[str, Tensor]]:
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    logs = []
    for _ in range(steps):
        parsed, logged = model.parse_losses(model.train().loss(images(), samples(labels())))
        wrapper.update_params(parsed)
        logs.append(logged)
    return logs


def test_background_is_where_no_class_says_yes(tmp_path: Path) -> None:
    _, model = later_stage(tmp_path)
    with torch.no_grad():
        (result, _) = model.eval().predict(images())
    scores = result.seg_logits.data[1:].sigmoid()
    expected = torch.where((scores > 0.5).any(0), scores.argmax(0) + 1, 0)
    assert torch.equal(result.pred_sem_seg.data[0], expected)
    assert {0} < set(expected.unique().tolist())
    assert not result.seg_logits.data[0].any()


def test_neither_losses_nor_weight_decay_nor_momentum_move_background(tmp_path: Path) -> None:
    old, new = later_stage(tmp_path, background_logit=-1.5)
    rows = new.state_dict()
    auxiliary = rows[f'{CONV_SEG}.auxiliary.weight'].clone()
    assert torch.equal(rows[f'{CONV_SEG}.weight'][NUM_OLD:], auxiliary.expand(2, -1, -1, -1))
    assert torch.equal(rows[f'{CONV_SEG}.weight'][1:NUM_OLD], old.state_dict()[f'{CONV_SEG}.weight'][1:])
    logs = train(new, dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.1))
    assert {'loss_output', 'loss_decomposed', 'loss_auxiliary', 'aux.loss_ce'} <= set(logs[0])
    trained = new.state_dict()
    for name in ('decode_head', 'auxiliary_head'):
        assert not trained[f'{name}.conv_seg.weight'][0].any()
        assert trained[f'{name}.conv_seg.bias'][0] == -1.5
        assert not torch.equal(trained[f'{name}.conv_seg.weight'][NUM_OLD:], rows[f'{name}.conv_seg.weight'][NUM_OLD:])
    assert not torch.equal(trained[f'{CONV_SEG}.auxiliary.weight'], auxiliary)


def test_the_auxiliary_classifier_gives_the_features_no_gradient(tmp_path: Path) -> None:
    _, model = later_stage(tmp_path)
    loss = model.loss(images(), samples(labels()))['loss_auxiliary']
    loss.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {f'{CONV_SEG}.auxiliary.weight', f'{CONV_SEG}.auxiliary.bias'}
    assert loss.item() > 0
    with torch.no_grad():
        model.decode_head.conv_seg.auxiliary.weight.zero_()
        model.decode_head.conv_seg.auxiliary.bias.zero_()
    assert model.loss(images(), samples(labels()))['loss_auxiliary'].item() == pytest.approx(math.log(2))


def test_the_parts_get_the_classifiers_input_and_rows(tmp_path: Path) -> None:
    _, model = later_stage(tmp_path)
    seen = {}
    part = model.distillation['decomposed']
    part.register_forward_hook(lambda _, inputs, __: seen.update(student=inputs[0], teacher=inputs[1]))
    model.loss(images(), samples(labels()))
    for output in seen.values():
        layer = output.classifier
        logits = torch.einsum('kc,bchw->bkhw', layer.weight, layer.features) + layer.bias[:, None, None]
        torch.testing.assert_close(logits, output.logits, rtol=1e-4, atol=1e-5)
    assert not model.decode_head.conv_seg._forward_pre_hooks
    bare = type(output)(output.logits, ())
    with pytest.raises(RuntimeError, match=r'needs the class attribute `needs_classifier = True`'):
        _ = bare.classifier


def test_another_thread_does_not_get_in_between(tmp_path: Path) -> None:
    """Ranks that are threads share an old model, as copies of a student do."""
    _, model = later_stage(tmp_path)
    head = model.decode_head
    inputs = model.backbone(images())
    with seen_classifier(head) as seen:
        head(inputs)
        other = threading.Thread(target=head, args=([feature[:1] for feature in inputs],))
        other.start()
        other.join()
    assert [len(one.features) for one in seen] == [len(images())]


def test_stock_mmseg_computes_the_same_without_the_auxiliary_row(tmp_path: Path) -> None:
    _, model = later_stage(tmp_path)
    stock = model_cfg(NUM_NEW) | dict(type='EncoderDecoder', auxiliary_head=auxiliary_head_cfg(NUM_NEW))
    stock['backbone']['type'] = 'MixVisionTransformer'
    weights = {key: value for key, value in model.state_dict().items() if not is_of_one_method(key)}
    check_same_logits(model.eval(), stock, weights)
    assert len(weights) + 2 == len(model.state_dict())


def test_a_softmax_head_as_base_predicts_as_before(tmp_path: Path) -> None:
    softmax = build(model_cfg(NUM_NEW, auxiliary_head=auxiliary_head_cfg(NUM_NEW)), seed=3)
    with torch.no_grad():  # so that no class has all pixels
        softmax.decode_head.conv_seg.bias -= softmax.eval()(images(), mode='tensor').mean((0, 2, 3))
    path = Path(save_weights(softmax, tmp_path / 'base.pth'))
    model = build(dkd_cfg(NUM_NEW))
    before = model.state_dict()[f'{CONV_SEG}.auxiliary.weight'].clone()
    model.load_state_dict(adopt_base(model, path, [str(c) for c in range(NUM_NEW)]))
    assert torch.equal(model.state_dict()[f'{CONV_SEG}.auxiliary.weight'], before)
    with torch.no_grad():
        (mine, _), (theirs, _) = (one.eval().predict(images()) for one in (model, softmax))
    assert torch.equal(mine.pred_sem_seg.data, theirs.pred_sem_seg.data)
    assert len(mine.pred_sem_seg.data.unique()) > 1
    torch.testing.assert_close(mine.seg_logits.data.softmax(0), theirs.seg_logits.data.softmax(0), rtol=0, atol=1e-5)


def test_a_stage_0_of_dkd_is_a_base_without_its_auxiliary_row(tmp_path: Path) -> None:
    old = build(dkd_cfg(NUM_NEW))
    path = Path(save_weights(old, tmp_path / 'base.pth'))
    other = build(dkd_cfg(NUM_NEW, classifier_init='random', distillation={}), seed=1)
    adopted = adopt_base(other, path, [str(c) for c in range(NUM_NEW)])
    assert set(adopted) == set(other.state_dict()) == {key for key in old.state_dict() if not is_of_one_method(key)}


def test_a_constant_row_is_loaded_bit_for_bit() -> None:
    one = SplitClassifier(4, NUM_NEW, NUM_OLD, background_logit=0.3)
    saved = one.state_dict()
    assert one.sizes == dict(old=2, new=2)
    assert saved['weight'].shape[0] == saved['bias'].shape[0] == NUM_NEW
    other = SplitClassifier(4, NUM_NEW, 1, background_logit=0.3)
    other.load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items())
    x = random_tensor(1, 4, 2, 2, dtype=torch.float32)
    assert torch.equal(one(x), other(x))
    assert torch.equal(one(x)[:, 0], torch.full((1, 2, 2), 0.3))


BALANCED = dict(classifier_init='balanced', distillation={})
CE = dict(type='CrossEntropyLoss')


@pytest.mark.parametrize(
    ('options', 'loss', 'message'),
    [
        (BALANCED, None, r"no row that new classes could start from by classifier_init='balanced'"),
        ({}, CE, r'background_logit=0.0: CrossEntropyLoss of decode_head trains background too'),
        (dict(background_logit=None), None, r'leaves background out, which then is trained by nothing'),
        (dict(background_logit=float('nan')), None, r'background_logit=nan: expected a finite number'),
        (dict(unknown=True, classifier_init='unknown', distillation={}), None, r'unknown=True and background_logit='),
        (dict(unknown=True), None, r"unknown=True and classifier_init='auxiliary' and background_logit="),
        (dict(distillation={}), None, r'an auxiliary classifier, which no part trains'),
        (dict(classifier_init='random'), None, r"with classifier_init='auxiliary', got 'random'"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_model_is_built(options: dict, loss: dict | None, message: str) -> None:
    cfg = dkd_cfg(NUM_OLD, **options)
    if loss:
        cfg['decode_head']['loss_decode'] = loss
    with pytest.raises(ValueError, match=message):
        build(cfg)


def test_losses_refuse_what_leaves_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r'leave none of 5 channels to train'):
        sigmoid_cross_entropy(random_tensor(1, 5, 2, 2), torch.zeros(1, 2, 2).long(), num_old=5, background=False)
    with pytest.raises(ValueError, match=r'num_old must be in 1..K'):
        SigmoidCrossEntropyLoss(num_old=6)(random_tensor(1, 5, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(ValueError, match=r'num_old counts the background and must be at least 1, got 0'):
        SigmoidCrossEntropyLoss(num_old=0)
    with pytest.raises(ValueError, match=r'SigmoidCrossEntropyLoss.pos_weight must be positive, got 0'):
        SigmoidCrossEntropyLoss(pos_weight=0)
