# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""STAR's replay of old classes by features drawn around their prototypes, and its two losses on features.

Chen et al., "Saving 100x Storage: Prototype Replay for Reconstructing Training Sample Distribution in
Class-Incremental Semantic Segmentation", NeurIPS 2023. Labels here are on the grid of the features. In a distributed
run the losses are those of the whole batch.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.features.prototypes import pixels_of
from mmseg_sats.functional.over_ranks import labels_over_ranks, sum_over_ranks
from mmseg_sats.functional.precision import full_precision, working_dtype


@dataclass(frozen=True)
class FeatureStatistics:
    """How the features of N classes are distributed: the direction and the norm of a feature, each with its spread.

    Args:
        prototypes: (N, C), unit vectors: the mean direction of each class's features.
        spreads: (N, C), the root of the mean squared difference between the unit features and the prototype.
        norm_means: (N,), the mean norm of the features.
        norm_spreads: (N,), the standard deviation of the norm.
    """

    prototypes: Tensor
    spreads: Tensor
    norm_means: Tensor
    norm_spreads: Tensor

    @classmethod
    def of_sums(cls, sums: Tensor) -> 'FeatureStatistics':
        """The statistics of the sums (N, 2 C + 3) of :func:`feature_sums`, of classes with a pixel."""
        number, norm, square = sums[:, -3:].unbind(1)
        units, squares = sums[:, :-3].chunk(2, 1)
        prototypes = F.normalize(units, dim=1)
        # The mean of (u - p)^2, which rounding must not take below 0.
        variances = (squares - 2 * prototypes * units) / number[:, None] + prototypes.square()
        means = norm / number
        norm_variances = (square - number * means.square()) / (number - 1).clamp(min=1)
        return cls(prototypes, variances.clamp(min=0).sqrt(), means, norm_variances.clamp(min=0).sqrt())

    def to(self, like: Tensor) -> 'FeatureStatistics':
        """The same with the device and dtype of a tensor."""
        return FeatureStatistics(*(getattr(self, field.name).to(like) for field in fields(self)))

    def drawn(self, index: int, number: int) -> Tensor:
        """(number, C) features of a class: (p + s e)(m + n e'), e a normal vector and e' a normal number."""
        prototype, spread = self.prototypes[index], self.spreads[index]
        units = prototype + spread * torch.randn(number, len(prototype), dtype=prototype.dtype, device=prototype.device)
        normal = torch.randn(number, 1, dtype=prototype.dtype, device=prototype.device)
        return units * (self.norm_means[index] + self.norm_spreads[index] * normal)


def feature_sums(features: Tensor, labels: Tensor, num_channels: int) -> Tensor:
    """What the statistics are made of, summed over the pixels of each class.

    Args:
        features: (B, C, h, w).
        labels: (B, h, w) long; labels from ``num_channels`` on, such as 255, are left out.
        num_channels: K.

    Returns:
        (K, 2 C + 3) float64: the unit features, their squares, the number of pixels, the norms and their squares.
    """
    where = labels < num_channels
    vectors = pixels_of(features, where).double()
    norms = vectors.norm(dim=1, keepdim=True)
    units = vectors / norms.clamp(min=torch.finfo(torch.float64).tiny)
    values = torch.cat([units, units.square(), torch.ones_like(norms), norms, norms.square()], 1)
    # A matrix product in float64 is reproducible on a GPU too.
    return F.one_hot(labels[where], num_channels).double().T @ values


def rejection(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """BCE(logits, 0) of feature vectors (N, C), summed over the rows (K, C) and (K,): (N,) of at least float32."""
    dtype = working_dtype(features, weight)
    with full_precision(features):
        return F.softplus(F.linear(features.to(dtype), weight.to(dtype), bias.to(dtype))).sum(1)


def replayed(
    statistics: FeatureStatistics, shares: Tensor, weight: Tensor, bias: Tensor, positions: int, most: int
) -> Tensor:
    """sum_c share_c mean BCE(x_new, 0) over drawn features of class c: the old classes as negatives of the new ones.

    A batch with P positions gets ``share_c P`` features of class c. Where these are more than ``most`` in all, fewer
    are drawn and each counts for more, so that the expected loss is the same.

    Args:
        statistics: of N old classes.
        shares: (N,), features of each class for each position of the batch, 0 or more.
        weight: (K, C), the classifier's rows of the new classes.
        bias: (K,).
        positions: of this process's share of the batch.
        most: how many features are drawn at most, if there are not more classes.

    Returns:
        A scalar. In a distributed run each process draws its own, and the value is their mean.
    """
    numbers = shares.double().cpu() * positions
    scale = min(1.0, most / max(float(numbers.sum()), 1.0))
    weight, bias = (value.to(working_dtype(value)) for value in (weight, bias))
    statistics, shares = statistics.to(weight), shares.to(weight)
    loss = 0 * weight.sum()  # part of the graph on every process, also without a class
    for index, number in enumerate((numbers * scale).ceil().long().tolist()):
        if number:
            loss = loss + shares[index] * rejection(statistics.drawn(index, number), weight, bias).mean()
    total, processes = sum_over_ranks(torch.stack([loss, torch.ones_like(loss)])).unbind()
    return total / processes


def rejected_background(features: Tensor, background: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of BCE(x_new, 0) over the background's positions, and their number, each divided by all positions.

    Args:
        features: (B, C, h, w).
        background: (B, h, w) bool.
        weight: (K, C), the classifier's rows of the new classes.
        bias: (K,).
    """
    losses = rejection(pixels_of(features, background), weight, bias)
    counts = losses.new_tensor([len(losses), background.numel()])
    total, number, positions = sum_over_ranks(torch.cat([losses.sum()[None], counts])).unbind()
    return total / positions, (number / positions).detach()


def masked_feature_mse(
    features: Tensor, old_features: Tensor, where: Tensor, *, over_all: bool = False
) -> Tensor:
    """The mean squared error of the features at some positions, a mean over these and the channels; 0 without any.

    Args:
        features: (B, C, h, w).
        old_features: (B, C, h, w), the old model's; they get no gradient.
        where: (B, h, w) bool.
        over_all: whether to divide by the number of all positions, and not of these.

    Raises:
        ValueError: the shapes disagree.
    """
    if features.shape != old_features.shape or where.shape != (len(features), *features.shape[2:]):
        raise ValueError(
            f'features must be (B, C, h, w) for both models and the mask (B, h, w), got {tuple(features.shape)}, '
            f'{tuple(old_features.shape)} and {tuple(where.shape)}'
        )
    dtype = working_dtype(features)
    new, old = (pixels_of(value, where).to(dtype) for value in (features, old_features.detach()))
    squares = (new - old).square().sum()
    divisor = squares.new_tensor((features if over_all else new).numel())
    total, number = sum_over_ranks(torch.stack([squares, divisor])).unbind()
    return total / number.clamp(min=1)


def prototype_separation(features: Tensor, labels: Tensor, prototypes: Tensor, num_old: int) -> Tensor:
    """The mean over the batch's new classes of 1 / min_c ||m - p_c||, m the mean direction of the class's features.

    Args:
        features: (B, C, h, w).
        labels: (B, h, w) long; labels below ``num_old`` and 255 are left out.
        prototypes: (N, C), unit vectors of the old classes, which get no gradient.
        num_old: the first label of a new class.

    Returns:
        A scalar, 0 without a new class or a prototype. A class at distance 0, where the gradient has no direction,
        is left out.
    """
    features = features.to(working_dtype(features))
    units = F.normalize(features, dim=1)
    classes = [c for c in labels_over_ranks(labels) if num_old <= c != 255]
    if not classes or not len(prototypes):
        return 0 * features.sum()
    sums = sum_over_ranks(torch.stack([pixels_of(units, labels == c).sum(0) for c in classes]))
    differences = F.normalize(sums, dim=1)[:, None] - prototypes.detach().to(sums)
    nearest = differences.square().sum(2).amin(1)
    nearest = nearest[nearest > 0]
    return nearest.rsqrt().mean() if len(nearest) else 0 * features.sum()
