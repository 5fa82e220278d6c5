# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ILT's feature distillation against a loop."""

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.models.losses import FeatureMSELoss, feature_mse
from tests.tensors import Output, random_tensor, value_and_gradient

SHAPES = [(2, 3, 4, 5), (2, 5, 2, 3)]


def features(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random_tensor(*shape, seed=seed, dtype=dtype) for shape in SHAPES]


def by_loop(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    total = 0.0
    for new, old in zip(student, teacher, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(new.flatten(), old.flatten().tolist(), strict=True)]
        total = total + sum(squares) / len(squares)
    return total / len(student)


@pytest.mark.parametrize('count', [1, 2])
def test_is_the_formula(count: int) -> None:
    student, teacher = features()[-count:], features(1)[-count:]
    student[0].requires_grad_()
    value, gradient = value_and_gradient(feature_mse(student, teacher), student[0])
    expected, expected_gradient = value_and_gradient(by_loop(student, teacher), student[0])
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_equal_features_cost_nothing() -> None:
    student = [feature.requires_grad_() for feature in features()]
    loss = feature_mse(student, features())
    loss.backward()
    assert loss.item() == 0
    assert all(feature.grad.abs().max() == 0 for feature in student)


def test_the_gradient_reaches_the_student_only() -> None:
    student, teacher = ([x.requires_grad_() for x in features(seed)] for seed in (0, 1))
    feature_mse(student, teacher).backward()
    assert all(x.grad.abs().max() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = ([x.half() for x in features(seed, torch.float32)] for seed in (0, 1))
    loss = feature_mse([x * 100 for x in student], teacher)  # squares beyond float16
    exact = feature_mse([(x * 100).double() for x in student], [x.double() for x in teacher])
    assert loss.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_module_takes_the_blocks_it_is_told() -> None:
    student, teacher = (Output(torch.zeros(0), tuple(features(seed) * 2)) for seed in (0, 1))
    labels = torch.full((2, 8, 8), 255)
    loss = MODELS.build({'type': 'FeatureMSELoss', 'loss_weight': 10.0})
    last = feature_mse(features()[1:], features(1)[1:])
    assert loss(student, teacher, labels).item() == pytest.approx(10 * last.item(), abs=1e-9)
    both = FeatureMSELoss(blocks=(1, 0))(student, teacher, labels)
    assert both.item() == pytest.approx(feature_mse(features(), features(1)).item(), abs=1e-9)
    assert loss.needs_attention is False


def test_wrong_features_are_named() -> None:
    one, other = features(), features(1)
    with pytest.raises(ValueError, match='at least one, got 0 and 0'):
        feature_mse([], [])
    with pytest.raises(ValueError, match='got 2 and 1'):
        feature_mse(one, other[:1])
    with pytest.raises(ValueError, match=r'features 1.*\(2, 5, 2, 3\) and \(2, 3, 4, 5\)'):
        feature_mse(one, [other[0], other[0]])
    with pytest.raises(ValueError, match=r'features 0: .*must both be'):
        feature_mse([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)])
    with pytest.raises(ValueError, match=r'blocks must be different indices.*\(0, 0\)'):
        FeatureMSELoss(blocks=(0, 0))
    with pytest.raises(ValueError, match=r'blocks \(3,\): the student has only 2 blocks, 0 to 1'):
        FeatureMSELoss()(Output(torch.zeros(0), tuple(one)), Output(torch.zeros(0), tuple(other)), one[0])
