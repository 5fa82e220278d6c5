# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Labels for every background pixel: the old model's class, or a fusion of old and new model's classes."""

import torch
from torch import Tensor

from mmseg_sats.functional.best_channel import best_channel


def old_labels(teacher_logits: Tensor) -> Tensor:
    """The old model's class at each pixel, background included: (B, H, W) long."""
    return best_channel(teacher_logits)[1]


def fused_labels(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Fuses the labels of old and new model.

    Let q be the old model's softmax and p the new model's. The old model's label is a = argmax q. The
    new model is used only for the new classes: its probabilities of background and old classes are
    summed, p_bg = p[0] + sum of p over old classes, and its label b is the most probable of background
    and new classes. If one of the two labels is background, the other is taken. If both are classes, the
    more confident one is taken: a if q_a >= p_b, else b.

    Yu et al., "Self-training for Class-Incremental Semantic Segmentation", TNNLS 2022: fusion with
    conflict reduction.

    Args:
        teacher_logits: (B, K_old, H, W), background included.
        student_logits: (B, K, H, W), the old model's channels first.

    Returns:
        (B, H, W) long.

    Raises:
        ValueError: the shapes disagree, or the new model has fewer channels than the old model.
    """
    num_old = teacher_logits.shape[1]
    same = teacher_logits.shape[:1] + teacher_logits.shape[2:]
    if same != student_logits.shape[:1] + student_logits.shape[2:] or (
        student_logits.shape[1] < num_old
    ):
        raise ValueError(
            'expected (B, K_old, H, W) and (B, K, H, W) with K >= K_old, got '
            f'{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}'
        )
    old_confidence, old = best_channel(teacher_logits.softmax(1))
    p = student_logits.softmax(1)
    p = torch.cat([p[:, :num_old].sum(1, keepdim=True), p[:, num_old:]], 1)
    new_confidence, new = best_channel(p)
    new_is_class = new > 0
    new_wins = new_is_class & ((old == 0) | (new_confidence > old_confidence))
    return torch.where(new_wins, new + num_old - 1, old)


def fill_background(labels: Tensor, opinion: Tensor) -> Tensor:
    """Labels (B, H, W) with those of ``opinion`` (B, H, W) on background, label 0; a new tensor like ``labels``."""
    return torch.where(labels == 0, opinion.to(labels.dtype), labels)
