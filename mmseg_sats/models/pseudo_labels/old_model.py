# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Pseudo-labels for every background pixel: the old model's class, or a fusion of old and new model's classes.

Both only change background pixels. So they can be used for a stage's own images, in which annotated
classes stay, and for images from outside, in which every pixel is background.
"""

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pseudo_labels.old_model import fill_background, fused_labels, old_labels
from mmseg_sats.models.parts import PseudoLabeler


class _BackgroundLabeler(PseudoLabeler):
    """Base class of labelers that replace the label of every background pixel; other labels stay."""

    pixelwise = True


@MODELS.register_module()
class OldModelPseudoLabeler(_BackgroundLabeler):
    """Labels every background pixel with the old model's class, whatever its confidence.

    Maracani et al., "RECALL: Replay-based Continual Learning in Semantic Segmentation", ICCV 2021:
    the labels of replayed images, and the background of the stage's own ("background inpainting").
    """

    @torch.no_grad()
    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """Returns the completed labels.

        Args:
            labels: (B, H, W) integers; not modified.
            teacher_logits: (B, K_old, H, W), the old model's logits at the labels' size.

        Returns:
            A new tensor like ``labels``.
        """
        return fill_background(labels, old_labels(teacher_logits))


@MODELS.register_module()
class FusedPseudoLabeler(_BackgroundLabeler):
    """Labels every background pixel by fusing the old and the new model's labels, see :func:`fused_labels`."""

    needs_student = True

    @torch.no_grad()
    def __call__(
        self, labels: Tensor, teacher_logits: Tensor, student_logits: Tensor
    ) -> Tensor:
        """Returns the completed labels.

        Args:
            labels: (B, H, W) integers; not modified.
            teacher_logits: (B, K_old, H, W), the old model's logits at the labels' size.
            student_logits: (B, K, H, W), the new model's logits.

        Returns:
            A new tensor like ``labels``.
        """
        return fill_background(labels, fused_labels(teacher_logits, student_logits))
