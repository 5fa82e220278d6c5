# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""LwF's and LwF-MC's losses over the logits against loops written from their formulas."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_sats.functional import resizing
from mmseg_sats.models.losses import (
    SigmoidCrossEntropyLoss,
    knowledge_distillation,
    sigmoid_cross_entropy,
    sigmoid_distillation,
)
from tests.tensors import Output, random_labels, random_tensor, value_and_gradient

DISTILLATIONS = [knowledge_distillation, sigmoid_distillation]
MODULES = {'KnowledgeDistillationLoss': knowledge_distillation, 'SigmoidDistillationLoss': sigmoid_distillation}


def pixels_of(*maps: Tensor) -> list[tuple[list[Tensor], ...]]:
    """The channels of each pixel, of each map (B, K, H, W)."""
    columns = [m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]
    return [tuple(list(column) for column in pixel) for pixel in zip(*columns, strict=True)]


def soft_cross_entropy_by_loop(student: Tensor, teacher: Tensor) -> Tensor:
    pixels, total = pixels_of(student, teacher), 0.0
    for x, old in pixels:
        exps = [math.exp(value.item()) for value in old]
        denominator = sum(x[c].exp() for c in range(len(old)))
        for c in range(len(old)):
            total = total + exps[c] / sum(exps) * (x[c].exp() / denominator).log()
    return -total / (len(pixels) * teacher.shape[1])


def binary_cross_entropy(x: Tensor, target: float) -> Tensor:
    p = 1 / (1 + (-x).exp())
    return -(target * p.log() + (1 - target) * (1 - p).log())


def sigmoid_distillation_by_loop(student: Tensor, teacher: Tensor) -> Tensor:
    pixels, total = pixels_of(student, teacher), 0.0
    for x, old in pixels:
        for c in range(len(old)):
            total = total + binary_cross_entropy(x[c], 1 / (1 + math.exp(-old[c].item())))
    mean = total / (len(pixels) * teacher.shape[1])
    return teacher.shape[1] * mean


LOOPS = {
    knowledge_distillation: soft_cross_entropy_by_loop,
    sigmoid_distillation: sigmoid_distillation_by_loop,
}


@pytest.mark.parametrize('distillation', DISTILLATIONS)
@pytest.mark.parametrize(('num_old', 'num_new'), [(1, 0), (1, 3), (2, 1), (4, 0), (4, 2)])
def test_distillation_is_the_formula(distillation: Callable, num_old: int, num_new: int) -> None:
    student = random_tensor(2, num_old + num_new, 3, 4).requires_grad_()
    teacher = random_tensor(2, num_old, 3, 4, seed=1)
    value, gradient = value_and_gradient(distillation(student, teacher), student)
    expected, expected_gradient = value_and_gradient(LOOPS[distillation](student, teacher), student)
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize('distillation', DISTILLATIONS)
def test_new_channels_get_no_gradient_and_have_no_say(distillation: Callable) -> None:
    student = random_tensor(2, 6, 3, 4).requires_grad_()
    teacher = random_tensor(2, 4, 3, 4, seed=1)
    value, gradient = value_and_gradient(distillation(student, teacher), student)
    assert gradient[:, 4:].abs().max() == 0
    assert gradient[:, :4].abs().min() > 0
    louder = torch.cat([student[:, :4], student[:, 4:] + 50], 1)
    assert distillation(louder, teacher).item() == value


@pytest.mark.parametrize('distillation', DISTILLATIONS)
def test_the_teacher_itself_is_the_best_student(distillation: Callable) -> None:
    teacher = random_tensor(2, 4, 3, 3)
    value, gradient = value_and_gradient(distillation(copy := teacher.clone().requires_grad_(), teacher), copy)
    assert gradient.abs().max() < 1e-12
    assert distillation(random_tensor(2, 4, 3, 3, seed=5), teacher) > value > 0


def test_distilling_the_teacher_itself_is_its_entropy() -> None:
    teacher = random_tensor(2, 4, 3, 3)
    entropy = torch.special.entr(teacher.softmax(1)).sum(1).mean()
    assert knowledge_distillation(teacher, teacher).item() == pytest.approx(entropy.item() / 4, abs=1e-12)


@pytest.mark.parametrize('distillation', DISTILLATIONS)
def test_the_gradient_reaches_the_student_only(distillation: Callable) -> None:
    student, teacher = (random_tensor(1, k, 3, 3, seed=k).requires_grad_() for k in (5, 3))
    distillation(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def sigmoid_cross_entropy_by_loop(logits: Tensor, labels: Tensor) -> Tensor:
    total = 0.0
    for (x,), label in zip(pixels_of(logits), labels.flatten().tolist(), strict=True):
        if label != 255:
            total = total + sum(binary_cross_entropy(x[c], float(c == label)) for c in range(len(x)))
    return total / labels.numel()


def test_sigmoid_cross_entropy_is_the_formula() -> None:
    logits, labels = random_tensor(2, 5, 3, 4).requires_grad_(), random_labels(2, 3, 4, classes=5)
    assert {0, 255} < set(labels.flatten().tolist())
    value, gradient = value_and_gradient(sigmoid_cross_entropy(logits, labels), logits)
    expected, expected_gradient = value_and_gradient(sigmoid_cross_entropy_by_loop(logits, labels), logits)
    assert value == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)
    assert gradient.permute(0, 2, 3, 1)[labels == 255].abs().max() == 0


def test_sigmoid_cross_entropy_is_torchs_on_one_hot_labels() -> None:
    logits, labels = random_tensor(2, 5, 6, 7), random_labels(2, 6, 7, classes=5).clamp(max=4)
    one_hot = F.one_hot(labels, 5).permute(0, 3, 1, 2).double()
    torchs = F.binary_cross_entropy_with_logits(logits, one_hot) * 5
    assert sigmoid_cross_entropy(logits, labels).item() == pytest.approx(torchs.item(), abs=1e-12)


def test_ignored_pixels_count_in_the_divisor_only() -> None:
    logits = random_tensor(1, 4, 2, 4)
    labels = torch.tensor([[[0, 1, 2, 3], [255, 255, 255, 255]]])
    upper = sigmoid_cross_entropy(logits[:, :, :1], labels[:, :1])
    assert sigmoid_cross_entropy(logits, labels).item() == pytest.approx(upper.item() / 2, abs=1e-12)


def test_the_class_with_the_largest_sigmoid_is_the_argmax() -> None:
    """So LwF-MC predicts as every other method does."""
    logits = random_tensor(2, 6, 8, 8)
    assert torch.equal(logits.sigmoid().argmax(1), logits.argmax(1))


def losses_of(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    return [*(loss(student, teacher) for loss in DISTILLATIONS), sigmoid_cross_entropy(student, labels)]


def test_large_logits_stay_finite() -> None:
    student = (1e4 * random_tensor(1, 4, 3, 3, dtype=torch.float32)).requires_grad_()
    labels = random_labels(1, 3, 3, classes=4)
    total = sum(losses_of(student, student[:, :2].detach().flip(1), labels))
    total.backward()
    assert math.isfinite(total.item())
    assert student.grad.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    student = random_tensor(2, 6, 8, 8, dtype=torch.float32).bfloat16().requires_grad_()
    teacher = random_tensor(2, 4, 8, 8, seed=1, dtype=torch.float32).bfloat16()
    labels = random_labels(2, 8, 8, classes=6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = losses_of(student, teacher, labels)
    for loss, exact in zip(losses, losses_of(student.double(), teacher.double(), labels), strict=True):
        assert loss.dtype == torch.float32
        assert exact.dtype == torch.float64
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        (expected,) = torch.autograd.grad(exact, student)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, expected, rtol=0.01, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes how often a tensor of ``size`` elements is made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = ('view', 'detach', 'alias', 'unbind', 'select', 'slice', 'transpose')
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and out.numel() >= self.size and not name.startswith(views) and name[-1] != '_':
            self.made += 1
        return out


@pytest.mark.parametrize('index', range(3))
def test_no_second_tensor_of_all_pixels_and_classes_but_the_gradient(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setitem(resizing.CHUNK_ELEMENTS, 'cpu', 6 * 8 * 8)  # an image
    student = random_tensor(4, 6, 8, 8).requires_grad_()
    teacher, labels = random_tensor(4, 4, 8, 8), random_labels(4, 8, 8, classes=6)
    losses: list[Callable[[], Tensor]] = [
        lambda: knowledge_distillation(student, teacher),
        lambda: sigmoid_distillation(student, teacher),
        lambda: sigmoid_cross_entropy(student, labels),
    ]
    with LargestTensor(teacher.numel()) as largest:
        loss = losses[index]()
        assert largest.made == 0
        loss.backward()
    assert largest.made <= 2  # the gradient, and its copy into the leaf


@pytest.mark.parametrize('distillation', DISTILLATIONS)
@pytest.mark.parametrize(('student', 'teacher'), [
    ((1, 3, 2, 2), (1, 4, 2, 2)),
    ((1, 4, 2, 2), (1, 4, 2, 3)),
    ((2, 4, 2, 2), (1, 4, 2, 2)),
    ((4, 2, 2), (4, 2, 2)),
])
def test_distillation_names_both_shapes(
    distillation: Callable, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match='student') as error:
        distillation(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(error.value)
    assert str(teacher) in str(error.value)


@pytest.mark.parametrize(('labels', 'message'), [
    (torch.zeros(1, 2, 3).long(), r'\(1, 4, 2, 2\) and \(1, 2, 3\)'),
    (torch.full((1, 2, 2), 4), r'0\.\.3 .* got \[4\]'),
    (torch.full((1, 2, 2), -1), r'0\.\.3 .* got \[-1\]'),
])
def test_sigmoid_cross_entropy_names_what_is_wrong(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_cross_entropy(torch.zeros(1, 4, 2, 2), labels)


@pytest.mark.parametrize('name', MODULES)
def test_distillation_modules_compare_at_the_size_of_the_labels(name: str) -> None:
    student, teacher = random_tensor(2, 5, 3, 4), random_tensor(2, 3, 3, 4, seed=1)
    loss = MODELS.build({'type': name, 'loss_weight': 10.0})
    resized = (F.interpolate(x, size=(6, 8), mode='bilinear') for x in (student, teacher))
    expected = 10 * MODULES[name](*resized)
    value = loss(Output(student), Output(teacher), torch.full((2, 6, 8), 255))
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.needs_attention is False


def test_sigmoid_cross_entropy_module_weighs_pixels() -> None:
    logits, labels = random_tensor(2, 5, 3, 4), random_labels(2, 3, 4, classes=5)
    loss = MODELS.build({'type': 'SigmoidCrossEntropyLoss', 'loss_weight': 2.0})
    pixels = loss(logits, labels, reduction_override='none')
    weight = torch.rand(2, 3, 4)
    assert loss.loss_name == 'loss_ce'
    expected = 2 * sigmoid_cross_entropy(logits, labels)
    assert loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss(logits, labels, weight=weight).item() == pytest.approx((pixels * weight).mean().item(), abs=1e-12)
    # The ignored label is the head's own.
    assert SigmoidCrossEntropyLoss()(logits, labels.clamp(max=4), ignore_index=0) > 0
