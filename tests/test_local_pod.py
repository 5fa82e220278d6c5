# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""PLOP's local POD against loops over cells, rows and columns."""

import math

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional import fold_new_into_background, local_pod
from mmseg_sats.models.losses import LocalPODLoss
from tests.tensors import Output, random_tensor, value_and_gradient


def cuts(length: int, parts: int) -> list[range]:
    """``parts`` neighbouring ranges, the first ones longer by one where ``length`` is no multiple."""
    short, longer = divmod(length, parts)
    ranges, start = [], 0
    for part in range(parts):
        stop = start + short + (part < longer)
        ranges.append(range(start, stop))
        start = stop
    assert start == length
    return ranges


def vector_by_loop(feature: Tensor, scales: tuple[int, ...]) -> list[Tensor]:
    """One image's (C, H, W) pooled rows and columns of every cell."""
    vector = []
    for channel in feature:
        for scale in scales:
            for rows in cuts(channel.shape[0], scale):
                for columns in cuts(channel.shape[1], scale):
                    if not (rows and columns):
                        continue
                    for y in rows:
                        vector.append(sum(channel[y, x] ** 2 for x in columns) / len(columns))
                    for x in columns:
                        vector.append(sum(channel[y, x] ** 2 for y in rows) / len(rows))
    return vector


def by_loop(student: Tensor, teacher: Tensor, scales: tuple[int, ...]) -> Tensor:
    total = 0.0
    for new, old in zip(student, teacher, strict=True):
        pairs = zip(vector_by_loop(new, scales), vector_by_loop(old, scales), strict=True)
        total = total + sum((a - b) ** 2 for a, b in pairs).sqrt()
    return total / len(student)


@pytest.mark.parametrize('size', [(4, 4), (8, 4), (5, 7)])
@pytest.mark.parametrize('scales', [(1,), (2,), (1, 2, 4)])
def test_is_the_formula(size: tuple[int, int], scales: tuple[int, ...]) -> None:
    student = random_tensor(2, 3, *size).requires_grad_()
    teacher = random_tensor(2, 3, *size, seed=1)
    value, gradient = value_and_gradient(local_pod([student], [teacher], scales)[0], student)
    expected, expected_gradient = value_and_gradient(by_loop(student, teacher, scales), student)
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (1, 5)])
def test_a_map_smaller_than_the_cells_has_a_cell_for_each_position(size: tuple[int, int]) -> None:
    student, teacher = random_tensor(2, 3, *size).requires_grad_(), random_tensor(2, 3, *size, seed=1)
    value, gradient = value_and_gradient(local_pod([student], [teacher])[0], student)
    assert value > 0
    assert gradient.isfinite().all()
    assert gradient.abs().min() > 0


def test_a_known_value() -> None:
    # Squares 4 and 0 on a 2 x 1 map against zeros. Rows: 4, 0. The column: 2.
    student = torch.tensor([[[[2.0], [0.0]]]])
    pod = local_pod([student], [torch.zeros_like(student)], (1,))
    assert pod.item() == pytest.approx(math.sqrt(16 + 0 + 4))


def test_equal_features_cost_nothing_and_pull_nowhere() -> None:
    teacher = random_tensor(2, 3, 8, 8)
    student = teacher.clone().requires_grad_()
    loss = local_pod([student], [teacher]).sum()
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_the_sign_of_a_feature_does_not_matter() -> None:
    teacher = random_tensor(2, 3, 8, 8)
    assert local_pod([-teacher], [teacher]).item() == 0


def test_fine_cells_see_what_coarse_ones_do_not() -> None:
    """The maps differ by exchanging two halves of a row and of a column alike."""
    teacher = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    teacher[0, 0, 0, 0] = teacher[0, 0, 2, 2] = 1
    student = torch.zeros_like(teacher)
    student[0, 0, 0, 2] = student[0, 0, 2, 0] = 1
    assert local_pod([student], [teacher], (1,)).item() == 0
    assert local_pod([student], [teacher], (2,)).item() > 0.1


def test_the_gradient_reaches_the_student_only() -> None:
    student, teacher = (random_tensor(2, 3, 4, 4, seed=seed).requires_grad_() for seed in (0, 1))
    local_pod([student], [teacher]).sum().backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (random_tensor(2, 3, 8, 8, seed=seed, dtype=torch.float32).bfloat16() for seed in (0, 1))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = local_pod([student], [teacher])
    exact = local_pod([student.double()], [teacher.double()])
    assert (value.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def outputs(num_seen: int, num_old: int) -> tuple[Output, Output]:
    sizes = [(4, 8, 8), (6, 4, 4), (6, 2, 2), (8, 1, 1)]
    features = ([random_tensor(2, *size, seed=seed) for size in sizes] for seed in (0, 1))
    channels = (num_seen, num_old)
    logits = (random_tensor(2, channels[seed], 8, 8, seed=seed + 2) for seed in (0, 1))
    return tuple(Output(z, tuple(f)) for z, f in zip(logits, features, strict=True))


@pytest.mark.parametrize(('num_seen', 'num_old'), [(6, 4), (17, 16), (3, 1)])
def test_module_is_plops_sum(num_seen: int, num_old: int) -> None:
    student, teacher = outputs(num_seen, num_old)
    folded = student.logits[:, :num_old].clone()
    for channel in range(num_old, num_seen):
        folded[:, 0] += student.logits[:, channel]
    total = 0.0005 * local_pod([folded], [teacher.logits])[0]
    for new, old in zip(student.features, teacher.features, strict=True):
        total += 0.01 * local_pod([new], [old])[0]
    expected = math.sqrt(num_seen / (num_seen - num_old)) * total / 5
    loss = MODELS.build({'type': 'LocalPODLoss'})
    value = loss(student, teacher, torch.zeros(2, 32, 32).long())
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.needs_attention is False


def test_module_takes_weights_and_any_blocks() -> None:
    student, teacher = outputs(5, 4)
    loss = LocalPODLoss(blocks=(2,), scales=(1,), feature_weight=3.0, logits_weight=0.0)
    expected = math.sqrt(5) * 3 * local_pod(student.features[2:3], teacher.features[2:3], (1,))[0] / 2
    assert loss(student, teacher, torch.zeros(0)).item() == pytest.approx(expected.item(), abs=1e-12)


def test_folding_keeps_the_sum_of_the_logits() -> None:
    logits = random_tensor(2, 6, 3, 3)
    folded = fold_new_into_background(logits, 4)
    assert folded.shape == (2, 4, 3, 3)
    torch.testing.assert_close(folded.sum(1), logits.sum(1))
    assert torch.equal(folded[:, 1:], logits[:, 1:4])
    assert torch.equal(fold_new_into_background(logits, 6), logits)


def test_what_is_wrong_is_named() -> None:
    one, other = random_tensor(1, 2, 4, 4), random_tensor(1, 2, 4, 3)
    with pytest.raises(ValueError, match=r'features 0.*\(1, 2, 4, 4\) and \(1, 2, 4, 3\)'):
        local_pod([one], [other])
    with pytest.raises(ValueError, match=r'from 1 on, got \(0, 2\)'):
        local_pod([one], [one], (0, 2))
    with pytest.raises(ValueError, match=r'different indices from 0 on, got \(-1,\)'):
        LocalPODLoss(blocks=(-1,))
    student, teacher = outputs(4, 4)
    with pytest.raises(ValueError, match='both have 4 channels, expected new ones'):
        LocalPODLoss()(student, teacher, torch.zeros(0))
    student, teacher = outputs(5, 4)
    with pytest.raises(ValueError, match=r'blocks \(7,\): the student has only 4 blocks'):
        LocalPODLoss(blocks=(7,))(student, teacher, torch.zeros(0))
