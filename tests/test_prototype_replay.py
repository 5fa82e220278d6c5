# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""STAR: statistics of features against two passes, drawn features, the replay's balance, and its two other losses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.features.prototype_replay import (
    FeatureStatistics,
    feature_sums,
    masked_feature_mse,
    prototype_separation,
    rejection,
    replayed,
)
from mmseg_sats.models import (
    PrototypeReplayLoss,
    PseudoLabelFeatureLoss,
    ReplayPrototypes,
    SegmentorOutput,
)
from mmseg_sats.models.heads.linear_classifier import LinearClassifier
from mmseg_sats.protocol import SETTINGS
from tests.small_models import build, images, model_cfg, samples, save_weights
from tests.tensors import random_labels, random_tensor, value_and_gradient

CLASSES, CHANNELS = 4, 3


def batch() -> tuple[Tensor, Tensor]:
    """Features (2, 3, 4, 5) and labels (2, 8, 10): classes 0 to 3 and ignored pixels."""
    small = random_labels(2, 4, 5, classes=CLASSES)
    return random_tensor(2, CHANNELS, 4, 5), small.repeat_interleave(2, 1).repeat_interleave(2, 2)


def test_statistics_are_those_of_two_passes() -> None:
    features, labels = batch()
    small = labels[:, ::2, ::2]
    parts = [feature_sums(features[i : i + 1], small[i : i + 1], CLASSES) for i in (1, 0)]
    found = FeatureStatistics.of_sums(sum(parts))
    for c in range(CLASSES):
        vectors = [features[i, :, y, x] for i, y, x in (small == c).nonzero().tolist()]
        assert sum(parts)[c, -3] == len(vectors) > 1
        units = [v / v.square().sum().sqrt() for v in vectors]
        prototype = sum(units) / sum(units).square().sum().sqrt()
        torch.testing.assert_close(found.prototypes[c], prototype)
        spread = (sum((u - prototype).square() for u in units) / len(units)).sqrt()
        torch.testing.assert_close(found.spreads[c], spread)
        norms = torch.stack([v.square().sum().sqrt() for v in vectors])
        torch.testing.assert_close(found.norm_means[c], norms.mean())
        torch.testing.assert_close(found.norm_spreads[c], norms.std())


def test_drawn_features_have_the_statistics() -> None:
    known = FeatureStatistics(*(torch.tensor(v).double() for v in ([[0.6, 0.8]], [[0.1, 0.0]], [5.0], [0.5])))
    torch.manual_seed(0)
    drawn = known.drawn(0, 20000)
    # The second channel is (p_2 + 0)(m + n e').
    torch.testing.assert_close(drawn.mean(0), torch.tensor([3.0, 4.0]).double(), rtol=0, atol=0.02)
    assert drawn[:, 1].std().item() == pytest.approx(0.8 * 0.5, rel=0.03)
    ratio = drawn[:, 0] / drawn[:, 1]  # the norm cancels: one number for all channels of a feature
    assert ratio.std().item() == pytest.approx(0.1 / 0.8, rel=0.03)


def exact(*numbers: int) -> FeatureStatistics:
    """Classes whose features all are the same."""
    units = F.normalize(random_tensor(len(numbers), CHANNELS), dim=1)
    return FeatureStatistics(units, 0 * units, torch.tensor(numbers).double(), torch.zeros(len(numbers)).double())


@pytest.mark.parametrize('most', [1, 7, 10**6])
def test_replay_is_the_formula_however_many_are_drawn(most: int) -> None:
    weight, bias = random_tensor(2, CHANNELS, seed=1).requires_grad_(), random_tensor(2, seed=2)
    known, shares = exact(2, 3, 5), torch.tensor([0.5, 0.0, 2.25]).double()
    loss = replayed(known, shares, weight, bias, positions=8, most=most)
    expected = 0.0
    for c, norm in enumerate((2, 3, 5)):
        for row, b in zip(weight, bias, strict=True):
            x = (row * norm * known.prototypes[c]).sum() + b
            expected = expected - shares[c] * (-x).sigmoid().log()
    value, gradient = value_and_gradient(loss, weight)
    expected, by_loop = value_and_gradient(expected, weight)
    assert value == pytest.approx(expected)
    torch.testing.assert_close(gradient, by_loop)
    assert replayed(exact(), shares[:0], weight, bias, 8, most).item() == 0


def test_how_many_features_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(FeatureStatistics, 'drawn', lambda self, c, n: asked.setdefault(c, torch.zeros(n, CHANNELS)))
    weight, bias = torch.ones(1, CHANNELS), torch.ones(1)
    shares = torch.tensor([0.5, 0.0, 2.25]).double()
    replayed(exact(1, 1, 1), shares, weight, bias, positions=8, most=10**6)
    assert {c: len(n) for c, n in asked.items()} == {0: 4, 2: 18}
    asked.clear()
    replayed(exact(1, 1, 1), shares, weight, bias, positions=8, most=11)
    assert {c: len(n) for c, n in asked.items()} == {0: 2, 2: 9}


def prototypes(setting: str = 'overlapped') -> ReplayPrototypes:
    """Of stage 0 with classes 1 and 2, and what stage 1 shows of them."""
    features, labels = batch()
    first = ReplayPrototypes(3, setting)
    first.add(first.sums_of(features, labels.masked_fill(labels == 3, 0)))
    second = ReplayPrototypes(CLASSES, setting)
    second.load_state_dict(first.state_dict())
    second.present = torch.tensor([10.0, 1.0, 50.0, 0.0, 80.0]).double()
    return second


def test_counts_and_statistics_go_on_from_stage_to_stage() -> None:
    features, labels = batch()
    for setting in SETTINGS:
        expected = [5.0, 0, 0] if setting == 'overlapped' else [10.0, 1.0, 50.0]
        own = prototypes(setting)
        before, known = own.counts.clone(), own.statistics
        assert own.known.tolist() == [False, True, True, False]
        assert before[0] == ((labels == 0) | (labels == 3)).sum() / 4
        own.add(own.sums_of(features * 2, labels))
        background = before[0] * (0.99 if setting == 'overlapped' else 1)
        expected = torch.tensor([background, *before[1:3]]).double() + torch.tensor(expected)
        torch.testing.assert_close(own.counts[:3], expected.double())
        assert own.counts[3] == (labels == 3).sum() / 4
        assert own.known.tolist() == [False, True, True, True]
        for name in ('prototypes', 'norm_means'):
            torch.testing.assert_close(getattr(own.statistics, name)[:2], getattr(known, name))
    again = ReplayPrototypes(CLASSES)
    again.load_state_dict(own.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in own.state_dict().items())
    with pytest.raises(ValueError, match=r'prototypes of 4 classes do not fit 3 classes'):
        ReplayPrototypes(3).load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match=r"ReplayPrototypes.setting.*did you mean 'disjoint'"):
        ReplayPrototypes(3, 'disjunct')


def test_shares_are_what_the_stage_does_not_show() -> None:
    own = prototypes()
    one, two = own.counts[1:3].tolist()
    assert two < 50
    assert own.shares.tolist() == pytest.approx([(one - 1) / 80, 0])
    assert own.background_share(1) == pytest.approx(max(float(own.counts[0]) * 0.99 / 10 - 0.5, 0))
    other = prototypes('disjoint')
    assert other.shares.tolist() == pytest.approx([one / 80, two / 80])
    assert other.background_share(1) == pytest.approx(float(other.counts[0]) / 10)


def outputs() -> tuple[SegmentorOutput, SegmentorOutput, Tensor]:
    features, labels = batch()
    weight = random_tensor(CLASSES, CHANNELS, seed=1).requires_grad_()
    bias = random_tensor(CLASSES, seed=2)
    logits = torch.einsum('kc,bchw->bkhw', weight, features) + bias[:, None, None]
    student = SegmentorOutput(logits, (), last_layer=LinearClassifier(features, weight, bias), prototypes=prototypes())
    old = random_tensor(*features.shape, seed=3)
    teacher = SegmentorOutput(
        random_tensor(2, 3, 4, 5, seed=4), (), last_layer=LinearClassifier(old, weight[:3], bias[:3])
    )
    return student, teacher, labels


def test_the_replay_and_the_weighted_segmentation_loss_are_the_balanced_loss() -> None:
    student, teacher, labels = outputs()
    known = student.prototypes.statistics
    own = student.prototypes
    own._sums = feature_sums(known.prototypes.T[None, :, None], torch.tensor([[[1, 2]]]), CLASSES)  # without a spread
    own.counts[1], own.present[0] = 500.0, 2.0
    weight, bias = student.classifier.weight, student.classifier.bias
    small, predicted = labels[:, ::2, ::2], teacher.logits.argmax(1)
    where = (small == 0) & (predicted == 0)
    share = own.background_share(1)
    assert share > 0
    background = share * int(where.sum()) / where.numel()
    replayed_share = (500 - 1) / 80
    fake = replayed_share * F.softplus((weight[3] * known.prototypes[0]).sum() + bias[3])
    shown = share * F.softplus(student.logits[:, 3][where]).sum() / where.numel()
    part = PrototypeReplayLoss()
    loss = part(student, teacher, labels)
    expected = (fake + shown) / (1 + replayed_share + background)
    torch.testing.assert_close(loss, expected)
    one, other = (torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(one, other)
    assert not one[:3].any()
    weights = part.image_weights(student, teacher, labels)
    assert weights.tolist() == pytest.approx([1 / (1 + replayed_share + background)] * 2)
    with pytest.raises(ValueError, match=r'PrototypeReplayLoss.most must be at least 1, got 0'):
        PrototypeReplayLoss(most=0)


def test_features_are_held_where_the_old_model_sees_an_old_class() -> None:
    student, teacher, labels = outputs()
    features = student.classifier.features.requires_grad_()
    total, count = 0.0, 0
    for i, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        if labels[i, 2 * y, 2 * x] == 0 and teacher.logits[i, :, y, x].argmax() > 0:
            count += CHANNELS
            total = total + (features[i, :, y, x] - teacher.classifier.features[i, :, y, x]).square().sum()
    loss = PseudoLabelFeatureLoss(5.0)(student, teacher, labels)
    value, gradient = value_and_gradient(loss, features)
    expected, by_loop = value_and_gradient(5 * total / count, features)
    assert value == pytest.approx(expected)
    torch.testing.assert_close(gradient, by_loop)
    nowhere = torch.zeros(2, 4, 5, dtype=torch.bool)
    assert masked_feature_mse(features, teacher.classifier.features, nowhere).item() == 0
    with pytest.raises(ValueError, match=r'the mask \(B, h, w\)'):
        masked_feature_mse(features, features, nowhere[:1])


def test_new_classes_are_kept_from_the_nearest_prototype() -> None:
    features = random_tensor(2, CHANNELS, 2, 2).requires_grad_()
    labels = torch.tensor([[[3, 3], [0, 1]], [[3, 4], [255, 4]]])
    old = F.normalize(random_tensor(3, CHANNELS, seed=1), dim=1)
    terms = []
    for c in (3, 4):
        units = [features[i, :, y, x] for i, y, x in (labels == c).nonzero().tolist()]
        centre = sum(u / u.square().sum().sqrt() for u in units)
        centre = centre / centre.square().sum().sqrt()
        terms.append(1 / min((centre - p).square().sum().sqrt() for p in old))
    value, gradient = value_and_gradient(prototype_separation(features, labels, old, 3), features)
    expected, by_loop = value_and_gradient(sum(terms) / 2, features)
    assert value == pytest.approx(expected)
    torch.testing.assert_close(gradient, by_loop)
    assert prototype_separation(features, labels, old, 6).item() == 0
    at_it = old[:1, :, None, None].expand(1, CHANNELS, 2, 2)
    assert prototype_separation(at_it, torch.full((1, 2, 2), 3), at_it[:, :, 0, 0], 3).item() == 0


def test_rejection_is_finite_and_in_float32() -> None:
    loss = rejection(torch.full((1, 2), 300.0).half(), torch.full((1, 2), 300.0).half(), torch.zeros(1).half())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(180000)
    assert rejection(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(3)).item() == pytest.approx(3 * math.log(2))


def test_the_heads_losses_are_weighted(tmp_path: Path) -> None:
    """With replay, the decode head's loss is divided by 1 + r + b; without anything to replay, it is as it was."""
    path = save_weights(build(model_cfg(3)), tmp_path / 'old.pth')
    options = dict(old_model=dict(checkpoint=path, num_old=3), prototypes=dict(type='ReplayPrototypes'))
    labels = torch.full((2, 64, 64), 3)
    labels[:, :30] = 255
    losses = {}
    for name, counts in (('none', 0.0), ('some', 40.0)):
        model = build(model_cfg(4, distillation=dict(replay=dict(type='PrototypeReplayLoss')), **options), seed=1)
        sums = feature_sums(torch.ones(1, 8, 1, 3), torch.arange(3)[None, None], 3)
        present = torch.tensor([0.0, 0, 0, 20])
        model.prototypes.load_state_dict(dict(sums=sums, counts=torch.full((3,), counts), present=present))
        model.prototypes.present[-1] = 20
        losses[name] = model.loss(images(), samples(labels))
    assert losses['none']['loss_replay'].item() == 0
    assert losses['some']['loss_replay'].item() > 0
    ratio = losses['none']['decode.loss_ce'] / losses['some']['decode.loss_ce']
    assert ratio.item() == pytest.approx(1 + 2 * 40 / 20)
