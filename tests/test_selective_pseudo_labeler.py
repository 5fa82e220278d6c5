# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MBS's selective pseudo-labels: by hand, against a loop, and what they never do."""

import math

import pytest
import torch
from torch import Tensor

from mmseg_sats.functional import selective_labels
from mmseg_sats.models import SelectivePseudoLabeler
from tests.tensors import random_labels, random_tensor


def to_logits(*probabilities: list[float]) -> Tensor:
    """(1, K, 1, W) logits of W pixels' probabilities."""
    return torch.tensor(probabilities, dtype=torch.float64).log().T[None, :, None]


def test_by_hand() -> None:
    logits = to_logits(
        [0.10, 0.80, 0.10],  # sure of class 1
        [0.10, 0.20, 0.70001],  # just sure enough
        [0.10, 0.69, 0.21],  # surely an old class, but not which one
        [0.40, 0.30, 0.30],  # background is most likely, and the old classes together outweigh it
        [0.45, 0.54, 0.01],  # class 1 is most likely, and not sure
        [0.51, 0.48, 0.01],  # background outweighs them
        [0.90, 0.05, 0.05],  # sure of background
        [0.10, 0.80, 0.10],
        [0.10, 0.80, 0.10],
        [0.10, 0.80, 0.10],
    )
    labels = torch.tensor([[[0, 0, 0, 0, 0, 0, 0, 1, 4, 255]]])
    before = labels.clone()
    assert SelectivePseudoLabeler()(labels, logits).tolist() == [[[1, 2, 255, 255, 255, 0, 0, 1, 4, 255]]]
    assert torch.equal(labels, before)
    found = SelectivePseudoLabeler(threshold=0.5, ignore_index=254)(labels, logits)
    assert found.tolist() == [[[1, 2, 1, 254, 1, 0, 0, 1, 4, 255]]]
    assert SelectivePseudoLabeler(0.5)(labels.byte(), logits).dtype == torch.uint8


def by_loop(labels: Tensor, logits: Tensor, threshold: float) -> Tensor:
    expected = labels.clone()
    for image, row, column in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        if labels[image, row, column] != 0:
            continue
        q = [math.exp(value) for value in logits[image, :, row, column].tolist()]
        q = [value / sum(q) for value in q]
        best = q.index(max(q))
        if best > 0 and q[best] >= threshold:
            expected[image, row, column] = best
        elif q[0] < sum(q[1:]):
            expected[image, row, column] = 255
    return expected


@pytest.mark.parametrize('num_old', [1, 2, 5])
@pytest.mark.parametrize('threshold', [0.3, 0.7, 1.0])
def test_is_the_rule(num_old: int, threshold: float) -> None:
    labels = random_labels(3, 9, 9, classes=num_old + 2)
    logits = random_tensor(3, num_old, 9, 9, seed=1) / 2
    found = selective_labels(labels, logits, threshold)
    assert torch.equal(found, by_loop(labels, logits, threshold))
    assert num_old == 1 or len(found[labels == 0].unique()) >= 2
    # What it is made for: background that outweighs all old classes together stays in the cross-entropy.
    q = logits.softmax(1)
    background = (labels == 0) & (q[:, 0] >= q[:, 1:].sum(1))
    assert background.any()
    assert not (found[background] == 255).any()
    if threshold > 0.5:
        assert (found[background] == 0).all()


def test_half_precision_is_compared_in_float32() -> None:
    logits = torch.tensor([-0.84765625, 0.0]).bfloat16().view(1, 2, 1, 1)
    labels = torch.zeros(1, 1, 1, dtype=torch.long)
    # What 0.7 is rounded to in bfloat16.
    assert logits.float().softmax(1)[0, 1] < 0.7003
    assert logits.softmax(1)[0, 1] >= 0.7003
    assert SelectivePseudoLabeler(0.7003)(labels, logits).item() == 255


@pytest.mark.parametrize('threshold', [0, -1, 1.1])
def test_impossible_thresholds(threshold: float) -> None:
    with pytest.raises(ValueError, match=r'threshold must be in \(0, 1\]'):
        SelectivePseudoLabeler(threshold)
