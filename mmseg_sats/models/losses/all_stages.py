# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Distillation of each class from the model of the stage that learned it, instead of from the last model alone.

Ge et al., "CIT: Rethinking Class-incremental Semantic Segmentation with a Class Independent Transformation", Pattern
Recognition 2025: with outputs that do not depend on each other, as sigmoids are, every earlier model can teach
its own classes directly.
"""

from typing import ClassVar

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pixels.means import check_channels, pixel_mean
from mmseg_sats.functional.pixels.sigmoid import sigmoid_distillation_of_pixels
from mmseg_sats.models.parts import WeightedPart
from mmseg_sats.models.segmentor_output import SegmentorOutput


@MODELS.register_module()
class AccumulativeDistillationLoss(WeightedPart):
    """:func:`sigmoid_distillation` of each class from the first model that knows it, at the labels' size.

    Background is distilled from the last model: to an earlier one, later classes were background too.

    Args:
        loss_weight: factor of the loss. No published value was found.
    """

    needs_all_teachers: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar, a mean over all pixels of labels (B, H, W), whose values are not used."""
        check_channels(student.logits, teacher.logits)
        return self.loss_weight * pixel_mean(
            sigmoid_distillation_of_pixels,
            student.logits,
            first_logits(teacher),
            labels,
            align_corners=student.align_corners,
        )


def first_logits(teacher: SegmentorOutput) -> Tensor:
    """Logits (B, K_o, h, w): background's of the old model, each other class's of the first model that has it."""
    channels = [teacher.logits[:, :1]]
    known = 1
    for output in (*teacher.earlier, teacher):
        channels.append(output.logits[:, known:])
        known = max(known, output.logits.shape[1])
    return torch.cat(channels, 1)
