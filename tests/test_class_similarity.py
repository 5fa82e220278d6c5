# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""REMINDER's distillation: by hand, against loops, and which classes and pixels it is about."""

import math

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional import class_similarities, class_similarity_distillation
from mmseg_sats.models.losses import ClassSimilarityDistillationLoss
from mmseg_sats.models.prototypes import ClassPrototypes
from mmseg_sats.models.segmentor_output import SegmentorOutput
from tests.tensors import random_labels, random_tensor, value_and_gradient

OLD, SEEN = 4, 6


def similarities_by_loop(prototypes: Tensor, known: list[bool], num_old: int, delta: float) -> list[list[float]]:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    rows = prototypes.tolist()
    old = [c for c in range(1, num_old) if known[c]]
    result = [[0.0] * num_old for _ in rows]
    for y, row in enumerate(rows):
        if not known[y] or not old:
            continue
        weights = {c: math.exp(cosine(row, rows[c])) for c in old}
        for c in old:
            share = weights[c] / sum(weights.values())
            result[y][c] = share if share >= delta / len(old) else 0.0
    return result


@pytest.mark.parametrize('known', [[0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]])
@pytest.mark.parametrize('delta', [0.0, 1.0])
def test_similarities_are_the_formula(known: list[int], delta: float) -> None:
    prototypes = random_tensor(SEEN, 5)
    expected = similarities_by_loop(prototypes, known, OLD, delta)
    found = class_similarities(prototypes, torch.tensor(known).bool(), OLD, delta)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    if delta and sum(known[1:OLD]) > 1:
        assert (found[OLD, :OLD] == 0).sum() > (torch.tensor(known[:OLD]) == 0).sum()


def test_the_similar_class_stays_and_the_opposite_one_goes() -> None:
    prototypes = torch.tensor([[9.0, 9.0], [1.0, 0.1], [-1.0, 0.0], [2.0, 0.0]])
    row = class_similarities(prototypes, torch.ones(4).bool(), 3)[3]
    assert row[1] > 0.8
    assert row[[0, 2]].tolist() == [0, 0]


def test_classes_exactly_alike_all_stay() -> None:
    for number in range(2, 40):
        prototypes = torch.ones(number + 2, 3)
        row = class_similarities(prototypes, torch.ones(number + 2).bool(), number + 1)[-1]
        assert (row[1:] > 0).all()


def loss_by_loop(student: Tensor, teacher: Tensor, labels: Tensor, similarities: Tensor, t: float) -> Tensor:
    terms = []
    for image, y, x in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        label = labels[image, y, x].item()
        if label == 255 or label < OLD:
            continue
        new = [value / t for value in student[image, :OLD, y, x]]
        old = [math.exp(value / t) for value in teacher[image, :, y, x].tolist()]
        normaliser = sum(value.exp() for value in new).log()
        terms.append(
            -sum(
                similarities[label, c].item() * old[c] / sum(old) * (new[c] - normaliser) for c in range(OLD)
            ) * t**2
        )
    return sum(terms) / len(terms)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_is_the_formula(temperature: float) -> None:
    student, teacher = random_tensor(2, SEEN, 5, 4).requires_grad_(), random_tensor(2, OLD, 5, 4, seed=1)
    labels = random_labels(2, 5, 4, classes=SEEN)
    similarities = random_tensor(SEEN, OLD, seed=2).abs()
    loss = class_similarity_distillation(student, teacher, labels, similarities, temperature=temperature)
    value, gradient = value_and_gradient(loss, student)
    expected = value_and_gradient(loss_by_loop(student, teacher, labels, similarities, temperature), student)
    assert value == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-12)


def test_it_is_about_pixels_of_new_classes_and_old_channels_alone() -> None:
    student, teacher = random_tensor(1, SEEN, 2, 2).requires_grad_(), random_tensor(1, OLD, 2, 2, seed=1)
    labels = torch.tensor([[[0, OLD - 1], [255, SEEN - 1]]])
    loss = class_similarity_distillation(student, teacher, labels, torch.ones(SEEN, OLD))
    gradient = value_and_gradient(loss, student)[1][0]
    assert gradient[:OLD, 1, 1].abs().min() > 0
    gradient[:OLD, 1, 1] = 0
    assert gradient.abs().max() == 0


def test_no_new_pixel_costs_nothing() -> None:
    student = random_tensor(1, SEEN, 2, 2).requires_grad_()
    loss = class_similarity_distillation(
        student, student[:, :OLD], torch.zeros(1, 2, 2).long(), torch.ones(SEEN, OLD)
    )
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_module_takes_the_segmentors_prototypes_and_half_precision() -> None:
    features = random_tensor(2, 5, 4, 4, dtype=torch.float32)
    labels = torch.arange(32).view(2, 4, 4) % SEEN
    prototypes = ClassPrototypes(SEEN)
    prototypes.update([features], labels)
    logits = random_tensor(2, SEEN, 2, 2, dtype=torch.float32).bfloat16()
    teacher = SegmentorOutput(random_tensor(2, OLD, 2, 2, seed=1, dtype=torch.float32).bfloat16(), ())
    student = SegmentorOutput(logits, (features,), prototypes=prototypes)
    loss = MODELS.build(dict(type='ClassSimilarityDistillationLoss', loss_weight=2.0, temperature=1.5, delta=0.5))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss(student, teacher, labels)
    assert value.dtype == torch.float32
    resized = [
        torch.nn.functional.interpolate(output.logits.double(), (4, 4), mode='bilinear')
        for output in (student, teacher)
    ]
    similarities = class_similarities(prototypes.means.double(), prototypes.known, OLD, 0.5)
    expected = 2 * loss_by_loop(*resized, labels, similarities, 1.5)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = random_tensor(1, SEEN, 2, 2), random_tensor(1, OLD, 2, 2)
    labels = torch.zeros(1, 2, 2).long()
    with pytest.raises(ValueError, match=r'similarities must be \(K, K_o\) = \(6, 4\), got \(4, 4\)'):
        class_similarity_distillation(student, teacher, labels, torch.ones(OLD, OLD))
    with pytest.raises(ValueError, match='at least the channels'):
        class_similarity_distillation(teacher, student, labels, torch.ones(OLD, SEEN))
    with pytest.raises(ValueError, match=r'ClassSimilarityDistillationLoss.temperature must be above 0, got 0'):
        ClassSimilarityDistillationLoss(temperature=0)
    with pytest.raises(ValueError, match=r'ClassSimilarityDistillationLoss.delta must be at least 0, got -1'):
        ClassSimilarityDistillationLoss(delta=-1)
