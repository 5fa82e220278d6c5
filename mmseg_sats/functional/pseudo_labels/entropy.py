# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""PLOP's pseudo-labels: the old model's class where it is confident; other background pixels are ignored.

Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR
2021, section 3.3: the entropy of the old model's prediction against a threshold for each class. Thresholds are
found in a pass over a stage's images before training::

    counts = no_entropies(num_old)
    for labels, teacher_logits in batches:
        count_entropies(counts, labels, teacher_logits)
    thresholds = entropy_thresholds(counts)

``rule`` is ``'median'``, ``'released'`` (the arithmetic of PLOP's released code), or a number in (0, 1] that is
the threshold of all classes.
"""

import torch
from torch import Tensor

from mmseg_sats.functional.best_channel import best_channel
from mmseg_sats.functional.pseudo_labels.thresholds import find_rule
from mmseg_sats.functional.resizing import logits_for_labels


def no_entropies(num_old: int, rule: str | float = 'median') -> Tensor:
    """The counts before the first batch: zeros (K_o, bins), int64.

    Args:
        num_old: K_o, the old model's channels, background included.
        rule: see the module's docstring.

    Raises:
        ValueError: ``num_old`` is less than 1, or the rule is unknown.
    """
    if num_old < 1:
        raise ValueError(f'num_old counts the background and must be at least 1, got {num_old}')
    return torch.zeros(num_old, find_rule(rule).bins, dtype=torch.int64)


@torch.no_grad()
def count_entropies(
    counts: Tensor, labels: Tensor, teacher_logits: Tensor, rule: str | float = 'median'
) -> None:
    """Adds the background pixels of a batch to the counts, in place.

    Args:
        counts: (K_o, bins), pixels by predicted class and entropy in [0, 1]; on the device of the logits.
        labels: (B, H, W) integers, 0 for background.
        teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.
        rule: see the module's docstring.

    Raises:
        ValueError: the shapes disagree.
    """
    entropy, pseudo = _predict(labels, teacher_logits, len(counts), rule)
    # Boolean indexing is avoided, because on a GPU it would wait for the device.
    number = counts.shape[1]
    bins = (entropy * number).long().clamp_(max=number - 1)
    index = pseudo * number + bins
    counts.view(-1).scatter_add_(0, index.flatten(), (labels == 0).flatten().long())


def entropy_thresholds(counts: Tensor, floor: float = 0.001, rule: str | float = 'median') -> Tensor:
    """The threshold of each class, (K_o,) float32, from the counts (K_o, bins) of all batches.

    Args:
        counts: see :func:`count_entropies`.
        floor: smallest threshold of a class, and that of a class without pixels; not for a number as rule.
        rule: see the module's docstring.
    """
    thresholds = find_rule(rule).threshold(counts)
    return (thresholds.clamp(min=floor) if isinstance(rule, str) else thresholds).float()


@torch.no_grad()
def entropy_labels(
    labels: Tensor,
    teacher_logits: Tensor,
    thresholds: Tensor,
    *,
    ignore_index: int = 255,
    rule: str | float = 'median',
) -> Tensor:
    """Labels background pixels with the old model's class if its entropy is under the class's threshold.

    Let q be the old model's softmax at a pixel of label 0, c its argmax (which may be background), and
    u = -sum q log q / log K_o. The pixel's new label is c if u < thresholds[c], else ``ignore_index``. Other
    labels stay.

    Args:
        labels: (B, H, W) integers; not modified.
        teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.
        thresholds: (K_o,), on the device of the logits.
        ignore_index: label of the background pixels that are not confident.
        rule: the one that the thresholds were found with; ``'released'`` computes the entropy in another way.

    Returns:
        A new tensor like ``labels``.

    Raises:
        ValueError: the shapes disagree with each other or with the thresholds.
    """
    entropy, pseudo = _predict(labels, teacher_logits, len(thresholds), rule)
    sure = entropy < thresholds[pseudo]
    taught = torch.where(sure, pseudo, ignore_index).to(labels.dtype)
    return torch.where(labels == 0, taught, labels)


def confident_share(labels: Tensor, completed: Tensor, ignore_index: int = 255) -> Tensor:
    """PLOP's factor of an image: the share of its background pixels that got a pseudo-label.

    If only few background pixels are confident, the new class's pixels would otherwise get too much
    weight. PLOP's released code divides by zero if an image has no background; here its factor is 1.

    Args:
        labels: (B, H, W) integers, 0 for background.
        completed: (B, H, W), the labels after the background pixels were pseudo-labelled or ignored.
        ignore_index: label of the pixels without a pseudo-label.

    Returns:
        (B,) float32 in [0, 1], 1 for an image without background.
    """
    background = (labels == 0).flatten(1)
    sure = background & (completed != ignore_index).flatten(1)
    total = background.sum(1)
    return torch.where(total > 0, sure.sum(1) / total.clamp(min=1), 1.0)


def _predict(labels: Tensor, logits: Tensor, num_old: int, rule: str | float) -> tuple[Tensor, Tensor]:
    """Entropy and predicted class, both (B, H, W), of logits (B, K_o, h, w) at the labels' size."""
    resized = logits_for_labels(labels, logits)
    if logits.shape[1] != num_old:
        raise ValueError(
            f'teacher_logits have {logits.shape[1]} channels, expected the {num_old} that the thresholds are for'
        )
    resized = resized.to(torch.promote_types(resized.dtype, torch.float32))
    return find_rule(rule).entropy(resized), best_channel(resized)[1]
