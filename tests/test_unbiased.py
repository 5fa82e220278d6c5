# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MiB's losses against loops written from their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional import unbiased_cross_entropy, unbiased_distillation
from mmseg_sats.models.losses import UnbiasedCrossEntropyLoss, UnbiasedDistillationLoss
from tests.tensors import Output, random_labels, random_tensor, value_and_gradient


def lse(values: list[Tensor]) -> Tensor:
    return torch.stack([value.exp() for value in values]).sum().log()


def cross_entropy_by_loop(logits: Tensor, labels: Tensor, num_old: int) -> Tensor:
    total = 0.0
    for image, label in zip(logits, labels, strict=True):
        for row in range(label.shape[0]):
            for column in range(label.shape[1]):
                x, c = list(image[:, row, column]), int(label[row, column])
                if c == 255:
                    continue
                own = lse(x[:num_old]) if c == 0 else x[c]
                total = total - (own - lse(x))
    return total / labels.numel()


def distillation_by_loop(student: Tensor, teacher: Tensor) -> Tensor:
    num_old, total = teacher.shape[1], 0.0
    for image, old_image in zip(student, teacher, strict=True):
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                x = list(image[:, row, column])
                old = [math.exp(value) for value in old_image[:, row, column].tolist()]
                q = [value / sum(old) for value in old]
                total = total + q[0] * (lse([x[0], *x[num_old:]]) - lse(x))
                for c in range(1, num_old):
                    total = total + q[c] * (x[c] - lse(x))
    return -total / (num_old * student[:, 0].numel())


@pytest.mark.parametrize('num_old', [1, 2, 4, 6])
def test_cross_entropy_is_the_formula(num_old: int) -> None:
    logits = random_tensor(2, 6, 4, 5).requires_grad_()
    labels = random_labels(2, 4, 5, classes=6)
    assert {0, 1, 5, 255} <= set(labels.flatten().tolist())
    value, gradient = value_and_gradient(unbiased_cross_entropy(logits, labels, num_old), logits)
    expected, expected_gradient = value_and_gradient(
        cross_entropy_by_loop(logits, labels, num_old), logits)
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize(('num_old', 'num_new'), [(1, 0), (1, 3), (2, 1), (4, 0), (4, 2)])
def test_distillation_is_the_formula(num_old: int, num_new: int) -> None:
    student = random_tensor(2, num_old + num_new, 3, 4).requires_grad_()
    teacher = random_tensor(2, num_old, 3, 4, seed=1)
    value, gradient = value_and_gradient(unbiased_distillation(student, teacher), student)
    expected, expected_gradient = value_and_gradient(
        distillation_by_loop(student, teacher), student)
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_gradients_pass_gradcheck_with_a_weighted_sum_of_pixels() -> None:
    labels = random_labels(2, 3, 3, classes=4)
    weight = torch.rand(2, 3, 3, dtype=torch.float64)
    loss = UnbiasedCrossEntropyLoss(num_old=2)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, labels, weight=weight), random_tensor(2, 4, 3, 3).requires_grad_())
    teacher = random_tensor(2, 2, 3, 3, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: unbiased_distillation(x, teacher), random_tensor(2, 4, 3, 3).requires_grad_())


@pytest.mark.parametrize(('label', 'num_old', 'expected'), [
    (0, 1, math.log(4)),  # uniform logits over four channels: p(0) = 1/4
    (0, 2, math.log(2)),  # p(background or one old class) = 2/4
    (0, 4, 0.0),
    (1, 2, math.log(4)),  # an old class that is labelled is itself alone
    (3, 2, math.log(4)),
    (255, 2, 0.0),
])
def test_cross_entropy_of_uniform_logits(label: int, num_old: int, expected: float) -> None:
    logits, labels = torch.zeros(1, 4, 1, 1), torch.full((1, 1, 1), label)
    loss = unbiased_cross_entropy(logits, labels, num_old)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_one_old_channel_is_plain_cross_entropy_over_all_pixels() -> None:
    logits, labels = random_tensor(2, 5, 6, 7), random_labels(2, 6, 7, classes=5)
    plain = F.cross_entropy(logits, labels, ignore_index=255, reduction='sum') / labels.numel()
    loss = unbiased_cross_entropy(logits, labels, 1)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)


def test_background_pixels_do_not_tell_old_channels_apart() -> None:
    logits = random_tensor(1, 5, 4, 4)
    swapped = logits[:, [2, 1, 0, 3, 4]]
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    loss = unbiased_cross_entropy(logits, labels, 3)
    same = unbiased_cross_entropy(swapped, labels, 3)
    assert same.item() == pytest.approx(loss.item(), abs=1e-12)
    assert abs((unbiased_cross_entropy(swapped, labels, 2) - loss).item()) > 1e-3


def test_ignored_pixels_count_in_the_divisor_only() -> None:
    logits = random_tensor(1, 4, 2, 4).requires_grad_()
    labels = torch.tensor([[[0, 1, 2, 3], [255, 255, 255, 255]]])
    loss = unbiased_cross_entropy(logits, labels, 2)
    upper = unbiased_cross_entropy(logits[:, :, :1], labels[:, :1], 2)
    assert loss.item() == pytest.approx(upper.item() / 2, abs=1e-12)
    loss.backward()
    assert logits.grad[:, :, 1].abs().max() == 0
    assert logits.grad[:, :, 0].abs().min() > 0


def test_large_logits_stay_finite() -> None:
    logits = (1e4 * random_tensor(1, 4, 3, 3, dtype=torch.float32)).requires_grad_()
    labels = random_labels(1, 3, 3, classes=4)
    loss = unbiased_cross_entropy(logits, labels, 2) + unbiased_distillation(logits, logits[:, :2])
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad.isfinite().all()


def test_a_class_that_is_masked_out_of_logits_of_the_labels_size_has_no_part() -> None:
    logits, labels = random_tensor(2, 5, 4, 5), random_labels(2, 4, 5, classes=4)
    logits[:, 4] = -math.inf
    found = unbiased_cross_entropy(logits, labels, 2)
    assert found.item() == pytest.approx(unbiased_cross_entropy(logits[:, :4], labels, 2).item())


def test_a_second_derivative_is_refused() -> None:
    logits = random_tensor(1, 3, 4, 5).requires_grad_()
    for loss in (
        unbiased_distillation(logits, random_tensor(1, 2, 4, 5, seed=1)),
        unbiased_cross_entropy(logits, random_labels(1, 4, 5, classes=3), 2),
    ):
        with pytest.raises(RuntimeError, match='first derivatives alone: create_graph=True'):
            torch.autograd.grad(loss, logits, create_graph=True)


def test_distilling_the_teacher_itself_is_its_entropy() -> None:
    teacher = random_tensor(2, 4, 3, 3)
    student = teacher.clone().requires_grad_()
    loss = unbiased_distillation(student, teacher)
    entropy = torch.special.entr(teacher.softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(entropy.item() / 4, abs=1e-12)
    loss.backward()
    assert student.grad.abs().max() < 1e-12
    assert unbiased_distillation(random_tensor(2, 4, 3, 3, seed=5), teacher) > loss


def test_a_background_split_into_new_classes_costs_nothing() -> None:
    teacher = random_tensor(1, 3, 4, 4)
    whole = random_tensor(1, 3, 4, 4, seed=1)
    shares = random_tensor(1, 3, 4, 4, seed=2).log_softmax(1)
    parts = whole[:, :1] + shares  # background and two new classes add up to the old background
    split = torch.cat([parts[:, :1], whole[:, 1:], parts[:, 1:]], dim=1)
    expected = unbiased_distillation(whole, teacher).item()
    assert unbiased_distillation(split, teacher).item() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_reaches_the_student_only() -> None:
    student, teacher = (random_tensor(1, k, 3, 3, seed=k).requires_grad_() for k in (5, 3))
    unbiased_distillation(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_distillation_gradient_of_a_pixel_sums_to_zero() -> None:
    student = random_tensor(1, 5, 3, 3).requires_grad_()
    unbiased_distillation(student, random_tensor(1, 3, 3, 3, seed=1)).backward()
    assert student.grad.sum(1).abs().max() < 1e-12


def test_half_precision_is_computed_in_float32() -> None:
    student = random_tensor(2, 6, 8, 8, dtype=torch.float32).bfloat16().requires_grad_()
    teacher = random_tensor(2, 4, 8, 8, seed=1, dtype=torch.float32).bfloat16()
    labels = random_labels(2, 8, 8, classes=6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = (unbiased_cross_entropy(student, labels, 4),
                  unbiased_distillation(student, teacher))
    exact = (unbiased_cross_entropy(student.double(), labels, 4),
             unbiased_distillation(student.double(), teacher.double()))
    for loss, expected in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        (expected_gradient,) = torch.autograd.grad(expected, student)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, expected_gradient, rtol=0.01, atol=1e-6)


def test_float64_stays_float64() -> None:
    logits, labels = random_tensor(1, 4, 2, 2), random_labels(1, 2, 2, classes=4)
    assert unbiased_cross_entropy(logits, labels, 2).dtype == torch.float64
    assert unbiased_distillation(logits, logits[:, :2]).dtype == torch.float64


@pytest.mark.parametrize(('num_old', 'labels', 'message'), [
    (0, torch.zeros(1, 2, 2).long(), r'num_old=0 for logits of K=4'),
    (5, torch.zeros(1, 2, 2).long(), r'num_old=5 for logits of K=4'),
    (2, torch.zeros(1, 2, 3).long(), r'\(1, 4, 2, 2\) and \(1, 2, 3\)'),
    (2, torch.zeros(1, 1, 2, 2).long(), r'\(1, 4, 2, 2\) and \(1, 1, 2, 2\)'),
    (2, torch.full((1, 2, 2), 4), r'0\.\.3 .* got \[4\]'),
    (2, torch.full((1, 2, 2), -1), r'0\.\.3 .* got \[-1\]'),
])
def test_cross_entropy_names_what_is_wrong(num_old: int, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unbiased_cross_entropy(torch.zeros(1, 4, 2, 2), labels, num_old)


@pytest.mark.parametrize(('student', 'teacher'), [
    ((1, 3, 2, 2), (1, 4, 2, 2)),
    ((1, 4, 2, 2), (1, 4, 2, 3)),
    ((2, 4, 2, 2), (1, 4, 2, 2)),
    ((4, 2, 2), (4, 2, 2)),
])
def test_distillation_names_both_shapes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match='student') as error:
        unbiased_distillation(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(error.value)
    assert str(teacher) in str(error.value)


def test_cross_entropy_module_weighs_pixels() -> None:
    logits, labels = random_tensor(2, 5, 3, 4), random_labels(2, 3, 4, classes=5)
    loss = MODELS.build({'type': 'UnbiasedCrossEntropyLoss', 'num_old': 3, 'loss_weight': 2.0})
    pixels = loss(logits, labels, reduction_override='none')
    weight = torch.rand(2, 3, 4)
    assert loss.loss_name == 'loss_ce'
    assert pixels.shape == labels.shape
    expected = 2 * unbiased_cross_entropy(logits, labels, 3)
    assert loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-12)
    for reduced, by_hand in [
            (loss(logits, labels, weight=weight), (pixels * weight).mean()),
            (loss(logits, labels, weight=weight, avg_factor=7.0), (pixels * weight).sum() / 7),
            (loss(logits, labels, reduction_override='sum'), pixels.sum())]:
        assert reduced.item() == pytest.approx(by_hand.item(), abs=1e-12)


def test_cross_entropy_module_refuses_what_it_cannot_do() -> None:
    logits, labels = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2).long()
    loss = UnbiasedCrossEntropyLoss(num_old=2)
    with pytest.raises(ValueError, match=r"'men' is unknown.*did you mean 'mean'"):
        loss(logits, labels, reduction_override='men')
    with pytest.raises(ValueError, match=r'weight must have the shape of label \(1, 2, 2\)'):
        loss(logits, labels, weight=torch.ones(1))
    with pytest.raises(ValueError, match='avg_factor'):
        loss(logits, labels, avg_factor=2.0, reduction_override='sum')
    with pytest.raises(ValueError, match='at least 1, got 0'):
        UnbiasedCrossEntropyLoss(num_old=0)
    with pytest.raises(ValueError, match='num_old=5 for logits of K=4'):
        UnbiasedCrossEntropyLoss(num_old=5)(logits, labels)


@pytest.mark.parametrize('thresh', [None, 0.7])
def test_cross_entropy_serves_an_mmseg_head_with_hard_example_mining(thresh: float | None) -> None:
    from mmengine.structures import PixelData
    from mmseg.models import FCNHead
    from mmseg.structures import SegDataSample

    head = FCNHead(
        in_channels=4, channels=4, in_index=0, num_convs=0, concat_input=False, num_classes=4,
        loss_decode={'type': 'UnbiasedCrossEntropyLoss', 'num_old': 2},
        sampler={'type': 'OHEMPixelSampler', 'thresh': thresh, 'min_kept': 8})
    labels = random_labels(2, 8, 8, classes=4)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
    logits = random_tensor(2, 4, 8, 8, dtype=torch.float32)
    kept = head.sampler.sample(logits, labels[:, None])
    pixels = UnbiasedCrossEntropyLoss(2)(logits, labels, reduction_override='none')
    loss = head.loss_by_feat(logits, samples)['loss_ce']
    assert 0 < kept.sum() < kept.numel()
    assert loss.item() == pytest.approx((pixels * kept).mean().item(), rel=1e-6)


@pytest.mark.parametrize('align_corners', [False, True])
def test_distillation_module_compares_at_the_size_of_the_labels(align_corners: bool) -> None:
    student, teacher = random_tensor(2, 5, 3, 4), random_tensor(2, 3, 3, 4, seed=1)
    labels = torch.full((2, 6, 8), 255)
    loss = MODELS.build({'type': 'UnbiasedDistillationLoss', 'loss_weight': 20.0})
    expected = 20 * unbiased_distillation(
        *(F.interpolate(x, (6, 8), mode='bilinear', align_corners=align_corners) for x in (student, teacher)))
    value = loss(*(Output(x, align_corners=align_corners) for x in (student, teacher)), labels)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert UnbiasedDistillationLoss.needs_attention is False
