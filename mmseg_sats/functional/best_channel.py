# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The largest of each pixel's channels."""

import torch
from torch import Tensor


def best_channel(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value at each pixel and its channel, the first of several equal ones.

    Args:
        values: (B, K, ...), logits or probabilities.

    Returns:
        (B, ...) of the dtype of ``values``, and (B, ...) long.
    """
    if values.device.type != 'cpu':
        return values.max(1)
    # On a CPU, torch's max with indices takes three times as long as this.
    channels = values.shape[1]
    best = values.amax(1, keepdim=True)
    ranks = torch.arange(channels, 0, -1, dtype=torch.float32).view(-1, *[1] * (values.dim() - 2))
    is_best = torch.eq(values, best, out=torch.empty(values.shape, dtype=torch.float32))
    # Where a value is NaN, nothing is equal to the largest one.
    rank = is_best.mul_(ranks).amax(1).clamp_(min=1)
    return best[:, 0], channels - rank.long()
