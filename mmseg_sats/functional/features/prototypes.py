# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SDR's losses on the encoder's features: matching, attraction, repulsion, sparsity.

Michieli and Zanuttigh, "Continual Semantic Segmentation via Repulsion-Attraction of Sparse and
Disentangled Latent Representations", CVPR 2021, section 4. Labels are resized to the features' grid by
nearest neighbour. Every class has the same weight, whatever its number of pixels, except in the sparsity
loss, where every pixel has the same weight.

None of these losses is a mean over images. In a distributed run they are computed from each class's sum,
number of pixels and maximum over all processes, with ``mmseg_sats.functional.over_ranks``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.over_ranks import labels_over_ranks, max_over_ranks, sum_over_ranks


def labels_on_grid(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) resized to ``size`` (h, w) by nearest neighbour."""
    if labels.shape[1:] == size:
        return labels
    return F.interpolate(labels[:, None].float(), tuple(size), mode='nearest')[:, 0].to(labels.dtype)


def pixels_of(features: Tensor, where: Tensor) -> Tensor:
    """The feature vectors (N, C) of features (B, C, h, w) at the N places of a (B, h, w) mask."""
    return features.permute(0, 2, 3, 1)[where]


def _prepare(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features in at least float32, and labels on their grid."""
    if features.dim() != 4 or labels.dim() != 3 or labels.shape[0] != features.shape[0]:
        raise ValueError(
            f'features must be (B, C, h, w) and labels (B, H, W), '
            f'got {tuple(features.shape)} and {tuple(labels.shape)}'
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features, labels_on_grid(labels, features.shape[2:])


def _mean(terms: list[Tensor], features: Tensor) -> Tensor:
    """The mean of the terms, 0 if there are none."""
    return torch.stack(terms).mean() if terms else features.new_zeros(())


def _class_means(vectors: list[Tensor], like: Tensor) -> Tensor:
    """The mean (N, C) of each of N classes' vectors (n, C) over all processes; N must be the same on all processes."""
    if not vectors:
        return like.new_zeros(0, like.shape[1])
    sums = [torch.cat([own.sum(0), own.new_full((1,), len(own))]) for own in vectors]
    total = sum_over_ranks(torch.stack(sums))
    return total[:, :-1] / total[:, -1:]


def _classes_with_prototype(labels: Tensor, known: Tensor) -> list[int]:
    known = known.tolist()
    return [label for label in labels_over_ranks(labels) if label < len(known) and known[label]]


def prototype_matching(
    features: Tensor, labels: Tensor, prototypes: Tensor, known: Tensor
) -> Tensor:
    """Squared error of each class's mean feature to its prototype: mean_c mean_k (mean_c(f)_k - p_ck)^2.

    Args:
        features: (B, C, h, w).
        labels: (B, H, W) long; classes without a prototype are left out.
        prototypes: (K, C), the mean feature of each class; they get no gradient.
        known: (K,) bool, which classes have a prototype.

    Returns:
        The mean over the classes, a scalar; 0 if there are none.

    Raises:
        ValueError: the shapes disagree.
    """
    features, labels = _prepare(features, labels)
    prototypes = prototypes.detach().to(features)
    classes = _classes_with_prototype(labels, known)
    means = _class_means([pixels_of(features, labels == c) for c in classes], features)
    return _mean(
        [(mean - prototypes[c]).square().mean() for c, mean in zip(classes, means, strict=True)],
        features,
    )


def prototype_attraction(
    features: Tensor, labels: Tensor, prototypes: Tensor, known: Tensor
) -> Tensor:
    """Squared error of each feature to its class's prototype: mean_c mean_{n in c} mean_k (f_nk - p_ck)^2.

    Arguments, result and errors are those of :func:`prototype_matching`.
    """
    features, labels = _prepare(features, labels)
    prototypes = prototypes.detach().to(features)
    squares = [
        (pixels_of(features, labels == c) - prototypes[c]).square()
        for c in _classes_with_prototype(labels, known)
    ]
    return _mean(list(_class_means(squares, features).mean(1)), features)


def repulsion(features: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Inverse distances between the batch's class means: mean_{i != j} 1 / ||mean_i(f) - mean_j(f)||.

    Args:
        features: (B, C, h, w).
        labels: (B, H, W) long; background is a class like any other here.
        ignore_index: label of the pixels that are left out.

    Returns:
        The mean over the pairs of classes, a scalar; 0 if there are fewer than two classes. Pairs at
        distance 0, for which the gradient has no direction, are left out.

    Raises:
        ValueError: the shapes disagree.
    """
    features, labels = _prepare(features, labels)
    present = [c for c in labels_over_ranks(labels) if c != ignore_index]
    means = _class_means([pixels_of(features, labels == c) for c in present], features)
    # The mean over i < j is that over i != j.
    squares = [
        (means[i] - means[j]).square().sum() for i in range(len(means)) for j in range(i)
    ]
    return _mean([square.rsqrt() for square in squares if square > 0], features)


def sparsity(features: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """A measure of how evenly a pixel's channels are used: mean_n sum_k exp(g_nk) / sum_k g_nk, g = f / max f.

    The maximum is taken over all channels and pixels of the pixel's class in the batch. The paper's
    features are the output of a ReLU. Here the positive part of the features is used, since otherwise
    the sum in the denominator could be 0 or negative.

    Args:
        features: (B, C, h, w).
        labels: (B, H, W) long; background is a class like any other here.
        ignore_index: label of the pixels that are left out.

    Returns:
        The mean over the pixels, a scalar; 0 if there are none. Pixels without a positive feature are
        left out.

    Raises:
        ValueError: if the shapes disagree.
    """
    features, labels = _prepare(features, labels)
    used = [
        _used(pixels_of(features, labels == c)) for c in labels_over_ranks(labels) if c != ignore_index
    ]
    if not used:
        return features.new_zeros(())
    largest = max_over_ranks(torch.stack([_largest(own) for own in used]))
    ratios = torch.cat([_ratios(own / top) for own, top in zip(used, largest, strict=True)])
    total, number = sum_over_ranks(torch.stack([ratios.sum(), ratios.new_full((), len(ratios))]))
    return total / number.clamp(min=1)


def _used(vectors: Tensor) -> Tensor:
    """The positive parts of vectors (n, C), without vectors that have no positive component."""
    positive = vectors.relu()
    return positive[positive.sum(1) > 0]


def _largest(vectors: Tensor) -> Tensor:
    """The largest of positive numbers, or 0 if there are none; in that case nothing is divided by it.

    The result is always part of the graph of ``vectors``. If it were so only on some processes, their
    backward passes would wait forever for the others.
    """
    return torch.cat([vectors.flatten(), vectors.new_zeros(1)]).max()


def _ratios(scaled: Tensor) -> Tensor:
    return scaled.exp().sum(1) / scaled.sum(1)
