# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Rows of new classes that are made of old ones: each formula against a loop over its numbers, and what follows."""

import math
from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmseg_sats.functional.new_rows import (
    active_shares,
    align_norms,
    attributions,
    largest_share,
    similar_rows,
)
from mmseg_sats.models.heads.class_tensors import class_tensors
from mmseg_sats.models.heads.new_rows import (
    MEASURED_STARTS,
    NewRows,
    RowMixture,
    measured_classifier,
)
from tests.small_models import auxiliary_head_cfg, build, model_cfg, save_weights
from tests.test_heads import GROW, head_cfg, make_head, outputs

OLD, NEW, CHANNELS = 4, 3, 6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_similar_rows_are_the_papers_mixture() -> None:
    weight, bias = numbers(OLD, CHANNELS), numbers(OLD, seed=1)
    # Two similar classes, one on the threshold alone, and only background.
    frequencies = torch.tensor(
        [[0.2, 0.3, 0.1, 0.4], [0.85, 0.15, 0.0, 0.0], [0.2, 0.0, 0.8, 0.0]], dtype=torch.float64
    )
    found, biases = similar_rows(weight, bias, frequencies, 0.15)
    for row, value, own in zip(found, biases, frequencies.tolist(), strict=True):
        chosen = [k for k in range(1, OLD) if own[k] > 0.15] or [0]
        mean = [sum(weight[k, j].item() for k in chosen) / len(chosen) for j in range(CHANNELS)]
        scores = [sum(m * weight[k, j].item() for j, m in enumerate(mean)) / CHANNELS**0.5 for k in chosen]
        shares = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        expected = [sum(a * weight[k, j].item() for a, k in zip(shares, chosen, strict=True)) for j in range(CHANNELS)]
        assert row.tolist() == pytest.approx(expected)
        assert value.item() == pytest.approx(sum(a * bias[k].item() for a, k in zip(shares, chosen, strict=True)))
    torch.testing.assert_close(found[1], weight[0])  # nothing is similar enough
    torch.testing.assert_close(found[2], weight[2])  # of one class, it is the class


def test_attributions_are_integrated_gradients() -> None:
    row, features = numbers(CHANNELS), numbers(5, CHANNELS, seed=1)
    steps = 50
    total = torch.zeros_like(features)
    for step in range(steps):
        at = (features * (step + 0.5) / steps).requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.linear(at, row[None], torch.ones(1).double()).sum(), at)
        total += gradient / steps
    torch.testing.assert_close(attributions(row, features), features * total)
    torch.testing.assert_close(attributions(row, features.mean(0)), (features * total).mean(0))


@pytest.mark.parametrize(('share', 'count'), [(0.25, 2), (0.01, 1), (1.0, 8)])
def test_the_largest_share(share: float, count: int) -> None:
    values = numbers(NEW, 8)
    chosen = largest_share(values, share)
    for row, mask in zip(values.tolist(), chosen.tolist(), strict=True):
        assert [v for v, m in zip(row, mask, strict=True) if m] == [v for v in row if v >= sorted(row)[-count]]


def test_active_shares_count_channels_that_speak_for_a_class() -> None:
    weight, features = numbers(OLD, CHANNELS), numbers(9, CHANNELS, seed=1)
    weight[1, 2] = features[3, 4] = 0.0
    q = numbers(9, OLD, seed=2).softmax(1)
    found = active_shares(weight, features, q)
    for k in range(OLD):
        for j in range(CHANNELS):
            terms = [q[n, k].item() for n in range(9) if weight[k, j].item() * features[n, j].item() > 0]
            assert found[k, j].item() == pytest.approx(sum(terms))


def norms(weight: Tensor) -> list[float]:
    return [math.sqrt(sum(x * x for x in row)) for row in weight.tolist()]


def test_aligned_rows_have_the_old_ones_size_on_average() -> None:
    old, biases = numbers(OLD, CHANNELS), numbers(OLD, seed=1)
    weight, bias = torch.cat([old, 7 * numbers(NEW, CHANNELS, seed=2)]), torch.cat([biases, numbers(NEW, seed=3)])
    weight[0] *= 3  # a start that changed background
    found, values = align_norms(weight, bias, old, biases)
    torch.testing.assert_close(found[:OLD], old)
    assert torch.equal(found[1:OLD], old[1:])
    assert torch.equal(values[:OLD], biases)
    gamma = sum(norms(old)) / OLD / (sum(norms(weight[OLD:])) / NEW)
    torch.testing.assert_close(found[OLD:], gamma * weight[OLD:])
    means = [sum(abs(b) for b in part.tolist()) / len(part) for part in (biases, bias[OLD:])]
    torch.testing.assert_close(values[OLD:], means[0] / means[1] * bias[OLD:])
    assert sum(norms(found[OLD:])) / NEW == pytest.approx(sum(norms(old)) / OLD)
    # The row of a constant background, of zeros, is no measure.
    constant = align_norms(*(rows.index_fill(0, torch.tensor(0), 0) for rows in (weight, bias, old, biases)))
    others = [sum(part[1:]) / (OLD - 1) for part in (norms(old), biases.abs().tolist())]
    torch.testing.assert_close(constant[0][OLD:], others[0] / (sum(norms(weight[OLD:])) / NEW) * weight[OLD:])
    torch.testing.assert_close(constant[1][OLD:], others[1] / means[1] * bias[OLD:])
    zero = align_norms(torch.cat([old, 0 * weight[OLD:]]), 0 * bias, old, biases)
    assert not zero[0][OLD:].any()
    assert not zero[1].any()


def test_a_mixture_of_rows_and_its_gradient() -> None:
    weight, bias = numbers(OLD + NEW, CHANNELS), numbers(OLD + NEW, seed=1)
    means, shown = numbers(NEW, OLD, CHANNELS, seed=2).abs(), torch.tensor([True, True, False])
    mixture = RowMixture((weight, bias), means, shown)
    found, values = mixture()
    for c in range(NEW):
        m = means[c].tolist() if shown[c] else [[float(k == 0)] * CHANNELS for k in range(OLD)]
        sums = [sum(row) for row in m]
        p = [math.exp(s) / sum(math.exp(other) for other in sums) for s in sums]
        for j in range(CHANNELS):
            expected = sum(p[k] * m[k][j] * weight[k, j].item() for k in range(OLD))
            assert found[OLD + c, j].item() == pytest.approx(expected)
    # As it starts, background is the old one, and a class without pixels nearly its copy.
    assert torch.equal(found[:OLD], weight[:OLD])
    assert torch.equal(values[:OLD], bias[:OLD])
    assert (values[OLD:] == bias[0]).all()
    outer = numbers(OLD + NEW, CHANNELS, seed=3)
    (found * outer).sum().backward()
    torch.testing.assert_close(
        mixture.projection.grad, torch.einsum('cd,ckd,kd->ck', outer[OLD:], mixture.importance, weight[:OLD])
    )
    torch.testing.assert_close(
        mixture.importance.grad, torch.einsum('cd,ck,kd->ckd', outer[OLD:], mixture.projection, weight[:OLD])
    )
    torch.testing.assert_close(mixture.background_importance.grad, outer[0] * weight[0])
    assert {name for name, _ in mixture.named_parameters()} == {
        'importance', 'projection', 'bias', 'background_importance', 'background_projection'}  # fmt: skip


def made(start: str, means: Tensor, shown: Tensor, **options: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    rows = numbers(OLD + NEW, CHANNELS), numbers(OLD + NEW, seed=1)
    before = tuple(part.clone() for part in rows)
    weight, bias = MEASURED_STARTS[start](**options).make(rows, means, shown)()
    assert all(torch.equal(part, own) for part, own in zip(rows, before, strict=True))
    return weight, bias, before


def test_similar_start_draws_a_little_noise() -> None:
    frequencies = torch.tensor([[0.5, 0.5, 0, 0]] * NEW).double()
    torch.manual_seed(0)
    weight, bias, before = made('similar', frequencies, torch.ones(NEW).bool())
    torch.manual_seed(0)
    noise = 0.05 * torch.randn(NEW, CHANNELS).double()
    torch.testing.assert_close(weight[OLD:], before[0][1] + 0.1 * noise)
    assert torch.equal(weight[:OLD], before[0][:OLD])
    torch.testing.assert_close(bias, torch.cat([before[1][:OLD], before[1][1].expand(NEW)]))
    exact, _, _ = made('similar', frequencies, torch.ones(NEW).bool(), noise=0.0)
    torch.testing.assert_close(exact[OLD:], before[0][1].expand(NEW, -1))


@pytest.mark.parametrize('copy_bias', [False, True])
def test_attributed_start_adds_channels_of_background(copy_bias: bool) -> None:
    means, shown = numbers(NEW, CHANNELS, seed=5), torch.tensor([True, False, True])
    weight, bias, before = made('attributed', means, shown, share=0.5, copy_bias=copy_bias)
    for c in range(NEW):
        chosen = sorted(range(CHANNELS), key=means[c].tolist().__getitem__)[-3:] if shown[c] else []
        expected = [x + before[0][0, j].item() * (j in chosen) for j, x in enumerate(before[0][OLD + c].tolist())]
        assert weight[OLD + c].tolist() == pytest.approx(expected)
    assert torch.equal(weight[:OLD], before[0][:OLD])
    shared = before[1][0] - math.log(NEW + 1)
    expected = before[1].clone()
    if copy_bias:
        expected[0] = expected[OLD:] = shared
    torch.testing.assert_close(bias, expected)


def test_what_is_measured_adds_up_over_pixels() -> None:
    weight, features = numbers(OLD, CHANNELS), numbers(9, CHANNELS, seed=1)
    logits = features @ weight.T
    for start, expected in dict(
        similar=torch.bincount(logits.argmax(1), minlength=OLD).double(),
        attributed=(weight[0] * features).sum(0),
        pretuned=active_shares(weight, features, logits.softmax(1)),
    ).items():
        of_pixels = MEASURED_STARTS[start]().of_pixels
        torch.testing.assert_close(of_pixels(weight, features, logits), expected)
        parts = [of_pixels(weight, features[n], logits[n]) for n in (slice(0), slice(4), slice(4, 9))]
        torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize(('given', 'message'), [
    ('similr', "classifier_init='similr' is unknown .*'similar'"),
    (dict(type='similar', epochs=3), "classifier_init.epochs is no option of 'similar'; expected one of .*'frequency'"),
    (dict(type='random', align_norm=True), r"align_norm is no option of 'random' \(did you mean 'align_norms'"),
    (dict(epochs=3), 'classifier_init=None is unknown'),
    (dict(type='pretuned', epochs=0), 'classifier_init.epochs=0: expected a whole number from 1'),
    (dict(type='pretuned', lr=-1), 'classifier_init.lr=-1'),
    (dict(type='attributed', share=1.5), 'classifier_init.share=1.5: expected a number from 0 to 1'),
    (dict(type='similar', frequency=True), 'classifier_init.frequency=True'),
])  # fmt: skip
def test_a_start_that_does_not_exist_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewRows(given)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(classifier_init='similar', unknown=True), "unknown=True and classifier_init='similar' do not go together"),
    (dict(classifier_init='attributed', background_residuals=1),
     "background_residuals=1 and classifier_init='attributed' do not go together"),
    (dict(classifier_init='pretuned', closed_form=dict(width=4)),
     r"closed_form=.* and classifier_init='pretuned' do not go together"),
    (dict(classifier_init='future', future_classes=2, unknown=True), 'unknown=True and future_classes=2'),
    (dict(classifier_init='balanced', future_classes=2), "future_classes=2 .* expected 'future'"),
    (dict(classifier_init='future', future_classes=-1), 'future_classes=-1: expected how many'),
])  # fmt: skip
def test_rows_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model_cfg(4, **options))


def test_a_head_without_a_classifier_of_pixels_is_refused() -> None:
    head = dict(
        type='SegmenterMaskTransformerHead', in_channels=32, channels=32, num_classes=4, num_layers=1, num_heads=2,
        embed_dims=32, in_index=3, dropout_ratio=0.0, loss_decode=dict(type='CrossEntropyLoss'),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r'decode_head \(SegmenterMaskTransformerHead\) has no classifier of pixels'):
        build(model_cfg(4, decode_head=head, classifier_init='similar'))
    for option in (dict(split_classifier=True), dict(classifier_init='future', future_classes=2)):
        with pytest.raises(TypeError, match=r'SegmenterMaskTransformerHead\) cannot have'):
            build(model_cfg(4, decode_head=head, **option))


@pytest.mark.parametrize('kind', [*GROW, 'CascadeHead'])
def test_the_inputs_that_are_measured_make_the_logits(kind: str) -> None:
    init_default_scope('mmseg')
    head = make_head(cfg := head_cfg(kind, 4), seed=0)
    classifier = head.get_submodule(measured_classifier(head, class_tensors('decode_head', head, cfg)))
    calls: list[Tensor] = []
    classifier.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    logits = outputs(head)[0]
    (features,) = calls
    torch.testing.assert_close(logits, nn.functional.conv2d(features, classifier.weight, classifier.bias))


@pytest.mark.parametrize('start', ['similar', 'attributed', 'pretuned'])
def test_heads_that_are_not_measured_start_from_background(start: str, tmp_path: Any) -> None:
    old = build(model_cfg(OLD, auxiliary_head=auxiliary_head_cfg(OLD)))
    path = save_weights(old, tmp_path / 'old.pth')
    cfg = model_cfg(
        OLD + NEW, auxiliary_head=auxiliary_head_cfg(OLD + NEW), old_model=dict(checkpoint=path, num_old=OLD),
        classifier_init=dict(type=start, align_norms=True),
    )  # fmt: skip
    new = build(cfg, seed=3)
    fresh = new.decode_head.conv_seg.weight.detach().clone()
    new.load_state_dict(torch.load(path, weights_only=True)['state_dict'], strict=False)
    background = old.auxiliary_head.conv_seg.weight[:1]
    rows = new.auxiliary_head.conv_seg.weight[OLD:]
    angles = nn.functional.cosine_similarity(rows.flatten(1), background.flatten(1))
    torch.testing.assert_close(angles, torch.ones(NEW))
    means = [w.flatten(1).norm(dim=1).mean() for w in new.auxiliary_head.conv_seg.weight.split([OLD, NEW])]
    torch.testing.assert_close(*means)
    assert torch.equal(new.decode_head.conv_seg.weight[OLD:], fresh[OLD:]) == (start == 'attributed')
