# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MBS's selective pseudo-labels: an unsure pixel stays background unless the old classes together outweigh it.

Park et al., "Mitigating Background Shift in Class-Incremental Semantic Segmentation", ECCV 2024.
"""

import torch
from torch import Tensor

from mmseg_sats.functional.best_channel import best_channel
from mmseg_sats.functional.resizing import logits_for_labels


@torch.no_grad()
def selective_labels(
    labels: Tensor, teacher_logits: Tensor, threshold: float = 0.7, ignore_index: int = 255
) -> Tensor:
    """Labels background pixels with the old model's class, leaves them background, or ignores them.

    Let q be the old model's softmax at a pixel of label 0 and c its argmax. The new label is

    - c if c is an old class and q_c >= threshold,
    - else ``ignore_index`` if q_0 < sum_{k >= 1} q_k,
    - else 0: background outweighs all old classes together.

    Other labels stay.

    Args:
        labels: (B, H, W) integers; not modified.
        teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.
        threshold: smallest probability of a pseudo-label.
        ignore_index: label of the pixels that are likely to be an old class, but not surely one of them.

    Returns:
        A new tensor like ``labels``.

    Raises:
        ValueError: the shapes disagree.
    """
    resized = logits_for_labels(labels, teacher_logits)
    q = resized.to(torch.promote_types(resized.dtype, torch.float32)).softmax(1)
    best, channel = best_channel(q)
    outweighed = q[:, 0] < q[:, 1:].sum(1)
    taught = torch.where(outweighed, ignore_index, 0)
    taught = torch.where((channel > 0) & (best >= threshold), channel, taught)
    return torch.where(labels == 0, taught.to(labels.dtype), labels)
