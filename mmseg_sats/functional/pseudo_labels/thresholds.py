# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The entropy of the old model's prediction at a pixel, and each class's threshold computed from a stage's pixels.

Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR
2021, section 3.3, and the arithmetic of their released code, which differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmseg_sats.utils.spelling import check_choice


def _normalised_entropy(logits: Tensor) -> Tensor:
    """-sum_c q_c log q_c / log K, in [0, 1], with q the softmax of logits (B, K, H, W) over their K channels."""
    channels = logits.shape[1]
    if channels == 1:
        return torch.zeros_like(logits[:, 0])
    # With x below the largest logit, it is log sum e^x - sum x e^x / sum e^x: no logarithm for each channel.
    below = logits - logits.amax(1, keepdim=True)
    below.clamp_(min=torch.finfo(below.dtype).min)  # a logit of -inf adds 0, not NaN
    weights = below.exp()
    total = weights.sum(1)
    mean = weights.mul_(below).sum(1) / total
    return ((total.log() - mean) / math.log(channels)).clamp_(0, 1)


def _released_entropy(logits: Tensor) -> Tensor:
    """As in PLOP's released code: a mean over the K channels, divided by log K twice. At most 1 / (K log K)."""
    channels = logits.shape[1]
    if channels == 1:
        return torch.zeros_like(logits[:, 0])
    q = logits.softmax(1)
    mean = -(q * (q + 1e-8).log()).mean(1)
    return (mean / math.log(channels + 1e-8) / math.log(channels)).clamp_(0, 1)


def _order_statistic(counts: Tensor, rank: Tensor) -> Tensor:
    """The ``rank``-th smallest value (from 0) of each row of (K, bins) counts over [0, 1], (K,).

    The lower end of that value's bin is returned. So the error is less than the width of a bin, and a
    value that equals the median is never below the result.
    """
    cumulative = counts.cumsum(1)
    index = torch.searchsorted(cumulative, rank[:, None], right=True)
    return (index.clamp_(max=counts.shape[1] - 1) / counts.shape[1])[:, 0]


def _median(counts: Tensor) -> Tensor:
    """The median of each row of (K, bins) counts over [0, 1]: (K,), 0 for an empty row."""
    total = counts.sum(1)
    lower, upper = ((total - 1).clamp(min=0) // 2, total // 2)
    median = (_order_statistic(counts, lower) + _order_statistic(counts, upper)) / 2
    return torch.where(total > 0, median, 0)


def _released_median(counts: Tensor) -> Tensor:
    """The thresholds (K,) as in PLOP's released code: like a median, but its running sum adds bin numbers, not counts.

    The search for a class stops at the first bin where half of the class's pixels lies between the running
    sum and the running sum plus the bin's count. If it never stops, the code divides by the last bin's
    count, 0, and the class's pixels either all pass or none.
    """
    bins = counts.shape[1]
    running = torch.arange(bins, dtype=torch.float64, device=counts.device).cumsum(0)
    before = torch.cat([running.new_zeros(1), running[:-1]])
    total = counts.sum(1, keepdim=True)
    missing = total / 2 - before
    stops = (missing >= 0) & (missing <= counts)
    stopped = stops.any(1, keepdim=True)
    index = torch.where(stopped, stops.int().argmax(1, keepdim=True), bins - 1)
    missing = torch.where(stopped, missing.gather(1, index), total / 2 - running[-1])
    threshold = (index + missing / counts.gather(1, index)) / bins
    threshold = torch.where(total > 0, threshold, 0).nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)
    return threshold[:, 0]


@dataclass(frozen=True)
class ThresholdRule:
    """How entropy is computed from logits, and a class's threshold from its histogram with ``bins`` bins."""

    bins: int
    entropy: Callable[[Tensor], Tensor]
    threshold: Callable[[Tensor], Tensor]


_RULES: dict[str, ThresholdRule] = {
    'median': ThresholdRule(65536, _normalised_entropy, _median),
    'released': ThresholdRule(100, _released_entropy, _released_median),
}


def _fixed_rule(value: float) -> ThresholdRule:
    """A rule with the same threshold for every class, which does not depend on its pixels."""
    return ThresholdRule(1, _normalised_entropy, partial(_same_for_all, value))


def _same_for_all(value: float, counts: Tensor) -> Tensor:
    return torch.full((len(counts),), value)


def find_rule(threshold: str | float) -> ThresholdRule:
    """The rule with a name, or, for a number in (0, 1], a rule with this threshold for all classes.

    Raises:
        ValueError: the name is unknown, or the number is out of range.
    """
    if isinstance(threshold, str):
        check_choice('threshold', threshold, _RULES)
        return _RULES[threshold]
    if not 0 < threshold <= 1:
        raise ValueError(
            f'threshold must be in (0, 1] or one of {sorted(_RULES)}, got {threshold}')
    return _fixed_rule(threshold)
