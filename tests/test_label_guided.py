# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Label-guided distillation against a loop written from its formula, and beside MiB's, whose gap it closes."""

import math

import pytest
import torch
from torch import Tensor

from mmseg_sats.functional import label_guided_distillation, unbiased_distillation
from mmseg_sats.models.losses import LabelGuidedDistillationLoss
from tests.tensors import Output, random_labels, random_tensor, value_and_gradient


def by_loop(student: Tensor, teacher: Tensor, labels: Tensor, old_weight: float, new_weight: float) -> Tensor:
    """The target over all channels is written out, as LGKD's paper has it."""
    num_old, total = teacher.shape[1], 0.0
    for image, row, column in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        x, label = student[image, :, row, column], int(labels[image, row, column])
        q = [math.exp(value) for value in teacher[image, :, row, column].tolist()]
        target = [value / sum(q) for value in q] + [0.0] * (len(x) - num_old)
        weight = old_weight
        if label != 255 and label >= num_old:
            target[label], target[0] = target[0], 0.0
            weight = new_weight
        for value, probability in zip(x, target, strict=True):
            total = total - weight * probability * (value - x.exp().sum().log())
    return total / (num_old * labels.numel())


@pytest.mark.parametrize(('num_old', 'num_new'), [(1, 0), (1, 3), (2, 1), (4, 0), (3, 3)])
@pytest.mark.parametrize('weights', [(1.0, 1.0), (1.0, 0.0), (0.5, 20.0)])
def test_is_the_formula(num_old: int, num_new: int, weights: tuple[float, float]) -> None:
    student = random_tensor(2, num_old + num_new, 4, 5).requires_grad_()
    teacher = random_tensor(2, num_old, 4, 5, seed=1)
    labels = random_labels(2, 4, 5, classes=num_old + num_new)
    labels[0, 0, 0] = 255
    loss = label_guided_distillation(student, teacher, labels, old_weight=weights[0], new_weight=weights[1])
    value, gradient = value_and_gradient(loss, student)
    expected, expected_gradient = value_and_gradient(by_loop(student, teacher, labels, *weights), student)
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)
    module = LabelGuidedDistillationLoss(3.0, *weights)
    assert module(Output(student), Output(teacher), labels).item() == pytest.approx(3 * expected)
    assert module.distance(student, teacher, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize('share', [0.99, 0.5, 0.01])
@pytest.mark.parametrize('label', [0, 1, 3, 255])
def test_unlike_mibs_it_says_how_background_and_new_class_share_the_old_background(share: float, label: int) -> None:
    """With p_0 + p_new = q_0, however shared, nothing moves MiB's model; this one moves as the label says."""
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    p = torch.cat([q, q[:1] * (1 - share)])
    p[0] *= share
    student, teacher = (value.log().view(1, -1, 1, 1) for value in (p, q))
    student.requires_grad_()
    _, gradient = value_and_gradient(unbiased_distillation(student, teacher), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    labels = torch.full((1, 1, 1), label)
    _, gradient = value_and_gradient(3 * label_guided_distillation(student, teacher, labels), student)
    # The gradient of a cross-entropy: probability less target.
    expected = p.clone()
    expected[1:3] -= q[1:]
    expected[3 if label == 3 else 0] -= q[0]
    torch.testing.assert_close(gradient.flatten(), expected, rtol=0, atol=1e-15)
    if label != 3:
        assert gradient.flatten()[3].item() == pytest.approx(p[3].item())  # away from the new class


def test_smallest_where_the_student_is_the_target() -> None:
    """Zero gradient where the new class has the old background's probability, on a pixel labelled so."""
    teacher = random_tensor(1, 3, 2, 2)
    student = torch.cat([torch.full((1, 1, 2, 2), -60.0), teacher[:, 1:], teacher[:, :1]], 1).requires_grad_()
    labels = torch.full((1, 2, 2), 3)
    _, gradient = value_and_gradient(label_guided_distillation(student, teacher, labels), student)
    assert gradient.abs().max() < 1e-12


def test_a_pixel_that_a_labeler_ignored_or_gave_an_old_class_counts_as_before() -> None:
    student, teacher = random_tensor(2, 5, 4, 4), random_tensor(2, 3, 4, 4, seed=1)
    labels = random_labels(2, 4, 4, classes=5)
    completed = labels.clone()
    completed[(labels == 0) & (torch.arange(4) % 2 == 0)] = 255
    completed[(labels == 0) & (torch.arange(4) % 2 == 1)] = 2
    assert not torch.equal(completed, labels)
    assert label_guided_distillation(student, teacher, completed).item() == pytest.approx(
        label_guided_distillation(student, teacher, labels).item(), abs=1e-12
    )


def test_extreme_logits_and_half_precision_stay_finite() -> None:
    student = (1e4 * random_tensor(1, 4, 3, 3, dtype=torch.float32)).requires_grad_()
    labels = random_labels(1, 3, 3, classes=4)
    loss = label_guided_distillation(student, student[:, :2], labels)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad.isfinite().all()
    half = label_guided_distillation(random_tensor(1, 4, 3, 3).half(), random_tensor(1, 2, 3, 3).half(), labels)
    assert half.dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = random_tensor(1, 4, 2, 2), random_tensor(1, 2, 2, 2)
    with pytest.raises(ValueError, match=r'labels must be in 0..3 .* got \[7\]'):
        label_guided_distillation(student, teacher, torch.full((1, 2, 2), 7))
    with pytest.raises(ValueError, match=r'at least the channels'):
        label_guided_distillation(teacher, student, torch.zeros(1, 2, 2).long())
    for name in ('old_weight', 'new_weight'):
        with pytest.raises(ValueError, match=rf'LabelGuidedDistillationLoss.{name} must be at least 0, got -1'):
            LabelGuidedDistillationLoss(**{name: -1})
