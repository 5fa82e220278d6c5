# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""UCD's contrastive distillation against a loop over pairs of pixels; which pixels it compares, and how many."""

import math

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional import contrastive_distillation
from mmseg_sats.models.losses import ContrastiveDistillationLoss
from mmseg_sats.models.segmentor_output import SegmentorOutput
from tests.tensors import random_tensor, value_and_gradient

OLD, SEEN = 3, 5


def unit(vector: Tensor) -> Tensor:
    return vector / (vector**2).sum().sqrt()


def by_loop(student: Tensor, teacher: Tensor, labels: list[int], q: list[list[float]], temperature: float) -> Tensor:
    anchors = [unit(f) for f in student]
    contrast = [(index, label, f.detach()) for index, (f, label) in enumerate(zip(anchors, labels, strict=True))]
    contrast += [(index, label, unit(teacher[index])) for index, label in enumerate(labels) if label < OLD]
    losses = []
    for i, (f, label) in enumerate(zip(anchors, labels, strict=True)):
        e = [((f * g).sum() / temperature).exp() for _, _, g in contrast]
        others = sum(value for value, (_, own, _) in zip(e, contrast, strict=True) if own != label)
        terms = []
        for place, (j, own, _) in enumerate(contrast):
            if own != label or place == i:
                continue
            weight = 1.0 if label >= OLD else sum(a * b for a, b in zip(q[i], q[j], strict=True))
            terms.append(-weight * (e[place] / (e[place] + others)).log())
        if terms:
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


def example(labels: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = len(labels)
    q = (random_tensor(n, OLD, seed=2) / 3).softmax(1)
    return random_tensor(n, 4).requires_grad_(), random_tensor(n, 4, seed=1), torch.tensor(labels), q


@pytest.mark.parametrize('labels', [[1, 2, 1, 3, 3, 4, 2], [1, 1], [3, 4, 4]])
@pytest.mark.parametrize('temperature', [0.07, 1.0])
def test_is_the_formula(labels: list[int], temperature: float) -> None:
    student, teacher, y, q = example(labels)
    value, gradient = value_and_gradient(contrastive_distillation(student, teacher, y, q, temperature), student)
    loop = by_loop(student, teacher, labels, q.tolist(), temperature)
    expected = value_and_gradient(loop, student)
    assert value == pytest.approx(expected[0], abs=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-12)


def test_classes_that_lie_apart_cost_less_and_the_old_models_features_pull() -> None:
    """Two old classes along two axes of the old model; a student with the axes exchanged is pulled back."""
    teacher = torch.eye(2, dtype=torch.float64)
    labels, q = torch.tensor([1, 2]), torch.eye(3, dtype=torch.float64)[1:]
    same, exchanged = (contrastive_distillation(s, teacher, labels, q).item() for s in (teacher, teacher.flip(0)))
    assert same < 1e-4
    assert exchanged > 10
    student = torch.tensor([[1.0, 1.0], [1.0, 1.1]], dtype=torch.float64, requires_grad=True)
    _, gradient = value_and_gradient(contrastive_distillation(student, teacher, labels, q), student)
    assert gradient[0, 0] < 0 < gradient[0, 1]
    assert gradient[1, 1] < 0 < gradient[1, 0]


def test_pixels_that_the_old_model_is_unsure_about_weigh_less() -> None:
    student, teacher, labels, _ = example([1, 1, 2])
    sure = torch.eye(OLD, dtype=torch.float64)[[1, 1, 2]]
    unsure = torch.full_like(sure, 1 / OLD)
    ratio = contrastive_distillation(student, teacher, labels, unsure) / contrastive_distillation(
        student, teacher, labels, sure
    )
    assert ratio.item() == pytest.approx(1 / OLD)
    new = labels + 2
    assert contrastive_distillation(student, teacher, new, unsure).item() == contrastive_distillation(
        student, teacher, new, sure
    ).item()


@pytest.mark.parametrize('labels', [[], [4]])
def test_without_a_pair_it_is_0_and_has_a_gradient(labels: list[int]) -> None:
    student, teacher, _, q = example(labels)
    value, gradient = value_and_gradient(
        contrastive_distillation(student, teacher, torch.tensor(labels, dtype=torch.long), q), student
    )
    assert value == 0
    assert gradient.abs().sum() == 0


def test_extreme_features_and_half_precision_stay_finite() -> None:
    student, teacher, labels, q = example([1, 2, 1, 3])
    small = (student.detach().float() * 1e-30).requires_grad_()
    value, gradient = value_and_gradient(contrastive_distillation(small, 1e30 * teacher.float(), labels, q), small)
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = contrastive_distillation(student.bfloat16(), teacher.bfloat16(), labels, q)
    exact = contrastive_distillation(student.bfloat16().double(), teacher.bfloat16().double(), labels, q)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=1e-4)


def outputs(size: int = 4) -> tuple[SegmentorOutput, SegmentorOutput, Tensor]:
    student, teacher = (
        SegmentorOutput(random_tensor(2, k, size, size, seed=k), (random_tensor(2, 4, size, size, seed=k + 1),))
        for k in (SEEN, OLD)
    )
    labels = torch.arange(8 * size * size).view(2, 2 * size, 2 * size) // 7 % (SEEN + 1)
    return student, teacher, torch.where(labels == SEEN, 255, labels)


def test_module_takes_foreground_and_what_the_old_model_sees_in_background() -> None:
    student, teacher, labels = outputs()
    rows = []
    for image in range(2):
        for y in range(4):
            for x in range(4):
                label, scores = labels[image, 2 * y, 2 * x].item(), teacher.logits[image, :, y, x]
                label = scores.argmax().item() if label == 0 else label
                if label not in (0, 255):
                    features = (output.features[0][image, :, y, x] for output in (student, teacher))
                    rows.append((*features, label, scores.softmax(0).tolist()))
    assert 0 < len(rows) < 32
    new, old, y, q = zip(*rows, strict=True)
    expected = 3 * by_loop(torch.stack(new), torch.stack(old), list(y), list(q), 0.5)
    loss = MODELS.build(dict(type='ContrastiveDistillationLoss', temperature=0.5, loss_weight=3.0))
    assert loss(student, teacher, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_more_pixels_than_allowed_drawn_anew_and_repeatably() -> None:
    student, teacher, labels = outputs(8)
    few = ContrastiveDistillationLoss(max_pixels=12)
    chosen = few._choose(torch.ones(2, 8, 8, dtype=torch.bool))
    assert len(set(zip(*(axis.tolist() for axis in chosen), strict=True))) == 12
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(few(student, teacher, labels).item())
    assert values[0] == values[1] != values[2]
    state = torch.get_rng_state()
    ContrastiveDistillationLoss()(student, teacher, labels)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn where all pixels are used


def test_what_does_not_fit_is_refused() -> None:
    student, teacher, labels, q = example([1, 2])
    with pytest.raises(ValueError, match=r'must be \(n, C\).*\[\(2, 4\), \(1, 4\), \(2,\), \(2, 3\)\]'):
        contrastive_distillation(student, teacher[:1], labels, q)
    with pytest.raises(ValueError, match=r'ContrastiveDistillationLoss.temperature must be above 0, got 0'):
        ContrastiveDistillationLoss(temperature=0)
    with pytest.raises(ValueError, match=r'ContrastiveDistillationLoss.max_pixels must be at least 1, got 0'):
        ContrastiveDistillationLoss(max_pixels=0)
