# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Whether a head's loss is cross-entropy under another name, as MiB's is while there are no old classes."""

from collections.abc import Mapping
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255


def as_plain(loss: Mapping[str, Any], num_channels: int) -> dict[str, Any]:
    """The config of a loss, or of cross-entropy where the loss trains exactly as that does.

    The loss is computed on an example: its value and gradient must be a multiple of the cross-entropy's
    mean over all pixels (ignored ones count in the divisor), up to the epsilon that mmseg adds there. A
    loss that cannot be called like mmseg's is returned unchanged.

    Args:
        loss: the config of a head's ``loss_decode``.
        num_channels: channels of the head.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_channels, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_channels, (2, 5, 7), generator=generator)
    labels[0, 0, :3] = IGNORE
    try:
        module = MODELS.build(dict(loss))
        value, slope = _value_and_gradient(
            lambda x: module(x, labels, weight=None, ignore_index=IGNORE), logits
        )
    except Exception:  # any error of a loss that needs more than logits and labels
        return dict(loss)
    plain, plain_slope = _value_and_gradient(
        lambda x: F.cross_entropy(x, labels, ignore_index=IGNORE, reduction='none').mean(), logits
    )
    weight = float(value / plain)
    if not torch.allclose(slope, weight * plain_slope, rtol=1e-6, atol=1e-12):
        return dict(loss)
    return dict(type='cross-entropy', weight=round(weight, 6))


def _value_and_gradient(loss: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient
