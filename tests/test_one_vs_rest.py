# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL's sigmoid loss against a loop written from its formula, and its pseudo-labels by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional import one_vs_rest
from mmseg_sats.models.losses import OneVsRestLoss
from mmseg_sats.models.pseudo_labels.sigmoid import SigmoidPseudoLabeler


def example(classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, classes, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes + 1, (2, 3, 5), generator=generator)
    return logits, torch.where(labels == classes, 255, labels)


def by_loop(logits: Tensor, labels: Tensor) -> Tensor:
    """-log s(x_y) - sum_{c != y} log(1 - s(x_c)), the mean over the pixels with a label."""
    total, count = 0.0, 0
    for image, label in zip(logits, labels, strict=True):
        for row in range(label.shape[0]):
            for column in range(label.shape[1]):
                y = int(label[row, column])
                if y == 255:
                    continue
                count += 1
                for c, x in enumerate(image[:, row, column]):
                    total = total - (x.sigmoid().log() if c == y else (-x).sigmoid().log())
    return total / count


def test_value_and_gradient_are_the_loops() -> None:
    logits, labels = example()
    assert (labels == 255).any()
    logits.requires_grad_()
    for loss in (one_vs_rest(logits, labels), OneVsRestLoss()(logits, labels)):
        expected = by_loop(logits, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_known_values() -> None:
    # Three classes at logit 0: each costs log 2.
    loss = one_vs_rest(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]]]))
    assert loss.item() == pytest.approx(3 * math.log(2))
    sure = torch.full((1, 3, 1, 1), -40.0)
    sure[0, 1] = 40.0
    assert one_vs_rest(sure, torch.tensor([[[1]]])).item() < 1e-6
    assert one_vs_rest(sure, torch.tensor([[[2]]])).item() == pytest.approx(80.0)


def test_a_class_does_not_touch_the_gradient_of_another() -> None:
    """What a softmax cannot promise: rows may be added beside frozen ones."""
    logits, labels = example()
    logits.requires_grad_()
    (one,) = torch.autograd.grad(one_vs_rest(logits, labels), logits)
    other = logits.detach().clone()
    other[:, 3] += 7
    other.requires_grad_()
    (two,) = torch.autograd.grad(one_vs_rest(other, labels), other)
    assert torch.equal(one[:, :3], two[:, :3])
    assert not torch.equal(one[:, 3], two[:, 3])


def test_ignored_pixels_neither_add_nor_count() -> None:
    logits, labels = example()
    wider = F.pad(labels, (0, 4), value=255)
    torch.testing.assert_close(
        one_vs_rest(F.pad(logits, (0, 4), value=3.0), wider), one_vs_rest(logits, labels)
    )
    nothing = one_vs_rest(logits.requires_grad_(), torch.full_like(labels, 255))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad.abs().max() == 0


def test_reductions_and_weights() -> None:
    logits, labels = example()
    loss = OneVsRestLoss(loss_weight=2.0)
    pixels = loss(logits, labels, reduction_override='none')
    assert pixels.shape == labels.shape
    assert pixels[labels == 255].abs().max() == 0
    torch.testing.assert_close(loss(logits, labels, reduction_override='sum'), pixels.sum())
    torch.testing.assert_close(loss(logits, labels, avg_factor=7), pixels.sum() / 7)
    weight = torch.zeros_like(labels, dtype=torch.float64)
    weight[0] = 1
    valid = (labels != 255).sum()
    torch.testing.assert_close(loss(logits, labels, weight=weight), pixels[0].sum() / valid)
    with pytest.raises(ValueError, match=r"'meen'.*did you mean 'mean'"):
        loss(logits, labels, reduction_override='meen')


def test_half_precision_is_computed_in_float32() -> None:
    logits, labels = example()
    loss = one_vs_rest(logits.half(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), one_vs_rest(logits, labels), rtol=1e-2, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = example()
    with pytest.raises(ValueError, match=r'labels must be in 0..3 .* got \[254\]'):
        one_vs_rest(logits, labels.masked_fill(labels == 0, 254))
    with pytest.raises(ValueError, match=r'of that size'):
        one_vs_rest(logits, labels[:, :2])


def scores_to_logits(*scores: list[float]) -> Tensor:
    """(1, K, 1, W) logits of W pixels' scores."""
    return torch.tensor(scores, dtype=torch.float64).logit().T[None, :, None]


def test_pseudo_labels_by_hand() -> None:
    logits = scores_to_logits(
        [0.10, 0.80, 0.20],  # sure of class 1
        [0.10, 0.71, 0.20],
        [0.10, 0.69, 0.20],  # not sure enough
        [0.90, 0.80, 0.20],  # background is surer
        [0.10, 0.75, 0.95],  # the larger of two sure classes
        [0.10, 0.80, 0.20],
        [0.10, 0.80, 0.20],
    )
    labels = torch.tensor([[[0, 0, 0, 0, 0, 3, 255]]])
    before = labels.clone()
    pseudo = SigmoidPseudoLabeler(threshold=0.7)(labels, logits)
    assert pseudo.tolist() == [[[1, 1, 0, 0, 2, 3, 255]]]
    assert torch.equal(labels, before)
    assert pseudo.dtype == labels.dtype
    assert SigmoidPseudoLabeler(0.78)(labels, logits).tolist() == [[[1, 0, 0, 0, 2, 3, 255]]]


def test_the_threshold_itself_is_enough() -> None:
    logits = torch.zeros(1, 2, 1, 1)
    logits[0, 0] = -1  # class 1 is at exactly 0.5
    assert SigmoidPseudoLabeler(0.5)(torch.zeros(1, 1, 1).long(), logits).item() == 1


def test_half_precision_scores_are_compared_in_float32() -> None:
    logits = torch.tensor([-5.0, 0.84375]).bfloat16().view(1, 2, 1, 1)
    labels = torch.zeros(1, 1, 1, dtype=torch.long)
    # What 0.7 is rounded to in bfloat16.
    assert logits[0, 1].float().sigmoid() < 0.7 <= logits[0, 1].sigmoid()
    assert SigmoidPseudoLabeler(0.7)(labels, logits).item() == 0


@pytest.mark.parametrize('threshold', [0, -1, 1.1])
def test_impossible_thresholds(threshold: float) -> None:
    with pytest.raises(ValueError, match=r'threshold must be in \(0, 1\]'):
        SigmoidPseudoLabeler(threshold)


def test_pseudo_labels_of_other_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r'labels \(B, H, W\), got \(1, 3, 2, 2\) and \(2, 2, 2\)'):
        SigmoidPseudoLabeler()(torch.zeros(2, 2, 2).long(), torch.zeros(1, 3, 2, 2))
