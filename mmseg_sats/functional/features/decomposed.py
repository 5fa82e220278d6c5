# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""DKD's distillation of the two terms of a logit.

Baek et al., "Decomposed Knowledge Distillation for Class-Incremental Semantic Segmentation", NeurIPS 2022,
section 3.2: the positive and the negative weights of a class's row say how far a feature speaks for the class and how
far against it. Distilling the logit keeps their sum alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.precision import full_precision, working_dtype


def decomposed_logits(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The positive and the negative term of each logit, without bias: z+ = W+ f and z- = W- f, W = W+ + W-.

    Args:
        features: (B, C, h, w).
        weight: (K, C).

    Returns:
        Two (B, K, h, w), whose sum is W f.
    """
    rows = torch.stack([weight.relu(), -(-weight).relu()]).flatten(0, 1)[:, :, None, None]
    positive, negative = F.conv2d(features, rows).chunk(2, 1)
    return positive, negative


def decomposed_distillation(features: Tensor, weight: Tensor, old_features: Tensor, old_weight: Tensor) -> Tensor:
    """BCE(z+, s(z+_old)) + BCE(z-, s(z-_old)), s the sigmoid: a sum over the classes, a mean over the positions.

    Args:
        features: (B, C, h, w), the input of the new model's classifier.
        weight: (K, C), its rows of the old classes.
        old_features: (B, C, h, w), the input of the old model's classifier; it gets no gradient.
        old_weight: (K, C), the same rows of the old model; they get no gradient.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: the shapes disagree.
    """
    shapes = [tuple(value.shape) for value in (features, weight, old_features, old_weight)]
    if len(shapes[0]) != 4 or shapes[0] != shapes[2] or len(shapes[1]) != 2 or shapes[1] != shapes[3] or (
        shapes[0][1] != shapes[1][1]
    ):
        raise ValueError(
            'features must be (B, C, h, w) and weights (K, C), the same for both models, '
            f'got {shapes[0]} and {shapes[1]}, and {shapes[2]} and {shapes[3]} of the old model'
        )
    dtype = working_dtype(features, weight)
    with full_precision(features):
        terms = decomposed_logits(features.to(dtype), weight.to(dtype))
        old = decomposed_logits(old_features.detach().to(dtype), old_weight.detach().to(dtype))
        losses = [
            F.binary_cross_entropy_with_logits(new, target.sigmoid(), reduction='none').sum(1).mean()
            for new, target in zip(terms, old, strict=True)
        ]
    return losses[0] + losses[1]
