# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Rows of a classifier for new classes, made of its rows for old ones.

A classifier is a pair of ``weight`` (K, d) and ``bias`` (K,), background first. K_o of its rows are old.
"""

import torch
from torch import Tensor


def similar_rows(weight: Tensor, bias: Tensor, frequencies: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """A mixture of the old classes that the old model sees in a new class's pixels (SELECT, 2026).

    With S the old classes whose frequency exceeds the threshold and theta_S their rows, the weights of the mixture
    are softmax(mean(theta_S) theta_S^T / sqrt(d)). A class without such an old class gets background's row.

    Args:
        weight: (K_o, d).
        bias: (K_o,), mixed with the same weights.
        frequencies: (N, K_o), which share of a new class's pixels the old model gives to each of its channels.
        threshold: the least frequency, exclusive.

    Returns:
        Weights (N, d) and biases (N,) of the N new classes.
    """
    rows = []
    for own in frequencies:
        similar = own > threshold
        similar[0] = not similar[1:].any()  # background stands alone, or not at all
        theta = weight[similar]
        shares = (theta.mean(0) @ theta.T / theta.shape[1] ** 0.5).softmax(0)
        rows.append((shares @ theta, shares @ bias[similar]))
    return torch.stack([row for row, _ in rows]), torch.stack([value for _, value in rows])


def attributions(row: Tensor, features: Tensor) -> Tensor:
    """Integrated gradients, from 0, of the logit that a row (d,) gives to features (..., d): the same shape.

    The gradient of a linear logit is the row itself wherever it is taken, so the integral over the path is
    exactly row * feature, and its mean over pixels is that of the mean feature.
    """
    return row * features


def largest_share(values: Tensor, share: float) -> Tensor:
    """A bool mask (N, d) of the ``share`` of the d values that are largest in each row, at least one."""
    count = max(1, round(share * values.shape[1]))
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(count, 1).indices, True)


def active_shares(weight: Tensor, features: Tensor, q: Tensor) -> Tensor:
    """How often each channel speaks for each old class, as NeST's importance matrix starts: a sum over pixels.

    Args:
        weight: (K_o, d).
        features: (n, d), the classifier's inputs at n pixels.
        q: (n, K_o), the old model's probabilities there.

    Returns:
        (K_o, d): the sum over the pixels of q_k where weight_kj * feature_j > 0.
    """
    # A product is positive where both signs agree, so two matrix products replace a tensor of n * K_o * d numbers.
    positive, negative = (q.T @ (sign * features > 0).to(q.dtype) for sign in (1, -1))
    return torch.where(weight > 0, positive, torch.where(weight < 0, negative, 0))


def align_norms(
    weight: Tensor, bias: Tensor, old_weight: Tensor, old_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales new rows to the size of the old ones.

    The new weights are multiplied by gamma = mean ||w_old|| / mean ||w_new||, the new biases by the same ratio of
    their mean absolute values. Of the old rows, those whose weight has changed get back the norm they had.
    What is 0 stays 0, and a row of zeros, such as that of a constant background, counts in no mean.

    Args:
        weight: (K, d), the first K_o rows of which are those of the old classes as the stage begins.
        bias: (K,).
        old_weight: (K_o, d), the old model's.
        old_bias: (K_o,).
    """
    num_old = len(old_weight)
    before, now = old_weight.norm(dim=1), weight.norm(dim=1)
    kept = _ratio(before, now[:num_old])
    rows = before > 0
    grown = _ratio(before[rows].mean(), now[num_old:].mean()).expand(len(weight) - num_old)
    biases = _ratio(old_bias[rows].abs().mean(), bias[num_old:].abs().mean())
    return torch.cat([kept, grown])[:, None] * weight, torch.cat([bias[:num_old], biases * bias[num_old:]])


def _ratio(wanted: Tensor, got: Tensor) -> Tensor:
    return torch.where((got > 0) & wanted.isfinite(), wanted / got, torch.ones_like(got))
