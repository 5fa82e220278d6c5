# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""UCB's weights of pixels in the segmentation loss: sure pixels and rare classes count more.

Liang et al., "Enhancing Continual Semantic Segmentation via Uncertainty and Class Balance Re-weighting", IEEE
Transactions on Image Processing 2025, in the form of their released code.
"""

import math

import torch
from torch import Tensor


def certainty_weights(entropies: Tensor, limit: float = 0.5) -> Tensor:
    """exp((limit - u) / limit) for an entropy u below the limit, else 0: from e for sure pixels down to 1, then 0.

    Args:
        entropies: the normalised entropies of the old model's predictions, in [0, 1]; 0 for annotated pixels.
        limit: the entropy from which on a pixel does not count.
    """
    return torch.where(entropies < limit, torch.exp((limit - entropies) / limit), 0)


def class_balance_weights(counts: Tensor, num_old: int) -> Tensor:
    """The factor of each class's pixels: sum_c n_c / (C n_c), between the roots of N / K_o and of K_o / N.

    n_c are the pixels of foreground class c, C the number of classes that have any, N the number of new classes.
    Background's factor is 1, and so is that of a class without pixels.

    Args:
        counts: (K,), the number of pixels of each class.
        num_old: K_o, background included.

    Returns:
        (K,) float64.
    """
    bound = math.sqrt((len(counts) - num_old) / num_old)
    low, high = sorted((bound, 1 / bound)) if bound else (1.0, 1.0)
    pixels = counts.double()
    present = pixels > 0
    present[0] = False
    total, number = pixels[1:].sum(), present.sum()
    ratios = total / (number * pixels).clamp(min=1)
    return torch.where(present, ratios.clamp(low, high), 1.0)
