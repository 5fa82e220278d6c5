# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The largest of each pixel's channels."""

import torch
from torch import Tensor


def best_channel(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value at each pixel and its channel, the first of several equal ones.

    Args:
        values: (B, K, ...), logits or probabilities.

    Returns:
        (B, ...) of the dtype of ``values``, and (B, ...) long. Of a pixel with NaN both are those of a NaN.
    """
    if values.device.type != 'cpu':
        return values.max(1)
    best = values.amax(1, keepdim=True)
    if best.isnan().any():  # which is equal to nothing
        return values.max(1)
    # On a CPU, torch's max with indices takes three times as long as this.
    like = dict(dtype=torch.float32, device=values.device)
    ranks = torch.arange(values.shape[1], 0, -1, **like).view(-1, *[1] * (values.dim() - 2))
    is_best = torch.eq(values, best, out=torch.empty(values.shape, **like))
    return best[:, 0], values.shape[1] - is_best.mul_(ranks).amax(1).long()
