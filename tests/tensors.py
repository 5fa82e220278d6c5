# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Tensors that the losses' tests share."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of standard deviation 3."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=dtype)


def random_labels(*shape: int, classes: int, seed: int = 0) -> Tensor:
    """All classes and some ignored pixels, with much background."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-classes, classes + 1, shape, generator=generator).clamp(min=0)
    return torch.where(labels == classes, 255, labels)


def value_and_gradient(loss: Tensor, inputs: Tensor) -> tuple[float, Tensor]:
    (gradient,) = torch.autograd.grad(loss, inputs)
    return loss.item(), gradient


@dataclass
class Output:
    """As much of a segmentor's output as a loss without attention asks for."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    align_corners: bool = False

    def resized(self, size: tuple[int, int]) -> Tensor:
        return F.interpolate(self.logits, size=size, mode='bilinear', align_corners=False)
