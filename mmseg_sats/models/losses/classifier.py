# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses that read a head's classifier and the features before it."""

from typing import ClassVar

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.decomposed import decomposed_distillation
from mmseg_sats.functional.precision import full_precision, working_dtype
from mmseg_sats.models.parts import WeightedPart
from mmseg_sats.models.segmentor_output import SegmentorOutput


class ClassifierLoss(WeightedPart):
    """The base class of the losses that need the classifier.

    Args:
        loss_weight: factor of the loss.
    """

    needs_classifier: ClassVar[bool] = True


@MODELS.register_module()
class DecomposedDistillationLoss(ClassifierLoss):
    """:func:`decomposed_distillation` of the old classes, without background, at the head's resolution.

    Args:
        loss_weight: factor of the loss, 5 published.
    """

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; the labels are not used.

        Raises:
            ValueError: the two models' features or rows have other shapes.
        """
        new, old = student.classifier, teacher.classifier
        rows = slice(1, len(old.weight))
        loss = decomposed_distillation(new.features, new.weight[rows], old.features, old.weight[rows])
        return self.loss_weight * loss


@MODELS.register_module()
class AuxiliaryClassifierLoss(ClassifierLoss):
    """BCE(auxiliary logit, 0), the mean over all pixels at the labels' size, on features that get no gradient.

    It trains the auxiliary classifier to reject everything that a stage shows; the next stage's new classes start from
    it (``classifier_init='auxiliary'``), so that they begin with the old stages' images among their negatives (DKD).

    Args:
        loss_weight: factor of the loss, 1 published.
    """

    needs_teacher: ClassVar[bool] = False
    needs_auxiliary: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; only the size of the labels (B, H, W) is used."""
        logits = student.classifier.auxiliary(student.classifier.features.detach())
        with full_precision(logits):
            logits = logits.to(working_dtype(logits))
            logits = F.interpolate(logits, labels.shape[-2:], mode='bilinear', align_corners=student.align_corners)
            return self.loss_weight * F.softplus(logits).mean()
