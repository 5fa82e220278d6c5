# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A classifier by ridge regression, from sums that can be added up over images, processes and stages."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ridge_sums(features: Tensor, labels: Tensor, num_channels: int) -> tuple[Tensor, Tensor]:
    """The sums that a ridge regression onto one-hot labels needs, in float64.

    Args:
        features: (N, D) of N pixels.
        labels: (N,) integers; those from ``num_channels`` on are left out.
        num_channels: K.

    Returns:
        ``E^T E`` (D, D) and ``Y^T E`` (K, D), with features E and one-hot labels Y.

    Raises:
        ValueError: the shapes disagree.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f'expected features (N, D) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}'
        )
    used = labels < num_channels
    pixels = features[used].double()
    targets = F.one_hot(labels[used].long(), num_channels).to(pixels)
    return pixels.T @ pixels, targets.T @ pixels


def ridge_rows(gram: Tensor, cross: Tensor, gamma: float = 1.0) -> Tensor:
    """The rows W (K, D) that minimise ``|E W^T - Y|^2 + gamma |W|^2``.

    That is ``W = cross (gram + gamma I)^-1``. The recursive form of C-RLS and ACIL (Woodbury's identity for the
    inverse, batch by batch) computes the same.

    Args:
        gram: (D, D), see :func:`ridge_sums`.
        cross: (K, D).
        gamma: above 0.
    """
    regular = gram.clone()
    regular.diagonal().add_(gamma)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(regular)).T.contiguous()
