# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""RCIL's pooled cube distillation against loops over windows of positions and of channels."""

import math

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional import fold_new_into_background, pooled_cube
from mmseg_sats.models.losses import PooledCubeDistillationLoss
from tests.tensors import Output, random_tensor, value_and_gradient


def windows(length: int, kernel: int) -> list[list[int]]:
    """The positions that each window of a padded line of this length covers."""
    padding = kernel // 2
    starts = range(-padding, length + padding - kernel + 1)
    return [[x for x in range(start, start + kernel) if 0 <= x < length] for start in starts]


def spatial_by_loop(feature: Tensor, kernel: int) -> list[Tensor]:
    """The averages of one image's (C, H, W) squares; positions outside of the map are zeros."""
    _, height, width = feature.shape
    return [
        sum((channel[y, x] ** 2 for y in rows for x in columns), channel.new_zeros(())) / kernel**2
        for channel in feature
        for rows in windows(height, kernel)
        for columns in windows(width, kernel)
    ]


def channel_by_loop(feature: Tensor, kernel: int) -> list[Tensor]:
    channels, height, width = feature.shape
    return [
        sum((feature[c, y, x] ** 2 for c in covered), feature.new_zeros(())) / kernel
        for y in range(height)
        for x in range(width)
        for covered in windows(channels, kernel)
    ]


def by_loop(student: Tensor, teacher: Tensor, spatial: tuple[int, ...], channel: int) -> tuple[Tensor, Tensor]:
    def norm(pool, kernel: int) -> Tensor:
        total = 0.0
        for new, old in zip(student, teacher, strict=True):
            pairs = zip(pool(new, kernel), pool(old, kernel), strict=True)
            total += sum((a - b) ** 2 for a, b in pairs).sqrt()
        return total / len(student)

    across = sum(norm(spatial_by_loop, kernel) for kernel in spatial) / len(spatial)
    return across, norm(channel_by_loop, channel)


@pytest.mark.parametrize(
    ('size', 'spatial', 'channel'),
    [((3, 4, 5), (4,), 3), ((2, 3, 2), (2, 6), 3), ((4, 2, 2), (1, 3), 2), ((1, 1, 1), (4,), 1)],
)
def test_is_the_formula(size: tuple[int, ...], spatial: tuple[int, ...], channel: int) -> None:
    student = random_tensor(2, *size).requires_grad_()
    teacher = random_tensor(2, *size, seed=1)
    expected = by_loop(student, teacher, spatial, channel)
    for which in range(2):
        value, gradient = value_and_gradient(pooled_cube([student], [teacher], spatial, channel)[which][0], student)
        expected_value, expected_gradient = value_and_gradient(expected[which], student)
        assert value == pytest.approx(expected_value, abs=1e-9)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_a_known_value() -> None:
    """One square of 4, seen in four windows of 2 x 2; in the channels it is seen alone, with zeros around it."""
    student = torch.full((1, 1, 1, 1), 2.0)
    spatial, channel = pooled_cube([student], [torch.zeros_like(student)], (2,), 3)
    assert spatial.item() == pytest.approx(2)
    assert channel.item() == pytest.approx(4 / 3)


def test_each_direction_is_blind_to_what_the_other_sees() -> None:
    """Energy that moves inside a window of positions costs nothing in space where all windows see both positions."""
    teacher = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    teacher[0, 1, 0, 0] = 1
    moved, mixed = torch.zeros_like(teacher), torch.zeros_like(teacher)
    moved[0, 1, 1, 1], mixed[0, 0, 0, 0] = 1, 1
    large, small = (pooled_cube([moved], [teacher], (kernel,))[0].item() for kernel in (24, 2))
    assert large < small / 100
    assert pooled_cube([moved], [teacher])[1] > 0.5
    assert pooled_cube([-teacher], [teacher])[0].item() == 0
    assert pooled_cube([mixed], [teacher])[1] < pooled_cube([2**0.5 * teacher], [teacher])[1] * 0.99


def test_equal_features_cost_nothing_and_the_gradient_reaches_the_student_only() -> None:
    teacher = random_tensor(2, 3, 4, 4).requires_grad_()
    student = teacher.detach().clone().requires_grad_()
    loss = sum(value.sum() for value in pooled_cube([student], [teacher]))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0
    assert teacher.grad is None


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (random_tensor(2, 3, 8, 8, seed=seed, dtype=torch.float32).bfloat16() for seed in (0, 1))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        values = pooled_cube([student], [teacher])
    for value, exact in zip(values, pooled_cube([student.double()], [teacher.double()]), strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(('num_seen', 'num_old'), [(6, 4), (3, 1)])
def test_module_is_rcils_sum(num_seen: int, num_old: int) -> None:
    sizes = [(4, 8, 8), (6, 2, 2)]
    student, teacher = (
        Output(random_tensor(2, channels, 8, 8, seed=seed), tuple(random_tensor(2, *s, seed=seed) for s in sizes))
        for seed, channels in enumerate((num_seen, num_old))
    )
    layers = [*student.features, fold_new_into_background(student.logits, num_old)]
    spatial, channel = pooled_cube(layers, [*teacher.features, teacher.logits], (2, 4), 3)
    expected = (0.01 * (spatial[0] + spatial[1]) + 0.0005 * spatial[2]) / 3 + 0.01 * (channel[0] + channel[1]) / 2
    loss = MODELS.build(dict(type='PooledCubeDistillationLoss', blocks=(0, 1), spatial_kernels=(2, 4)))
    value = loss(student, teacher, torch.zeros(0))
    assert value.item() == pytest.approx(math.sqrt(num_seen / (num_seen - num_old)) * expected.item(), abs=1e-12)
    assert 'spatial_kernels=(2, 4)' in repr(loss)
    with pytest.raises(ValueError, match=f'both have {num_old} channels, expected new ones'):
        loss(teacher, teacher, torch.zeros(0))


@pytest.mark.parametrize('options', [dict(spatial_kernels=()), dict(spatial_kernels=(4, 0)), dict(channel_kernel=0)])
def test_impossible_kernels(options: dict) -> None:
    with pytest.raises(ValueError, match='must be sizes of windows, from 1 on'):
        PooledCubeDistillationLoss(**options)
