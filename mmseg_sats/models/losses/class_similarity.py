# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""REMINDER's distillation as a part of a segmentor's loss; ``mmseg_sats.functional`` has its two functions."""

from typing import ClassVar

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pixels.class_similarity import (
    class_similarities,
    class_similarity_distillation,
)
from mmseg_sats.models.parts import WeightedPart
from mmseg_sats.models.segmentor_output import SegmentorOutput


@MODELS.register_module()
class ClassSimilarityDistillationLoss(WeightedPart):
    """:func:`class_similarity_distillation`, with the similarities of the classes' prototypes.

    The prototypes are the running means of the segmentor's ``prototypes``. Only pixels that are labelled as a new
    class count; in an exemplar too, since exemplars have the labels of all seen classes.

    Args:
        loss_weight: factor of the loss, 0.5 in the released scripts.
        temperature: the temperature of both softmaxes, 3 in the released code.
        delta: an old class counts if its similarity is at least ``delta`` times the average, 1 in the released code.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``delta`` is negative.
    """

    needs_prototypes: ClassVar[bool] = True
    reduces_over_ranks: ClassVar[bool] = True

    def __init__(self, loss_weight: float = 0.5, temperature: float = 3.0, delta: float = 1.0) -> None:
        super().__init__(loss_weight)
        if not temperature > 0:
            raise ValueError(f'ClassSimilarityDistillationLoss.temperature must be above 0, got {temperature}')
        if not delta >= 0:
            raise ValueError(f'ClassSimilarityDistillationLoss.delta must be at least 0, got {delta}')
        self.temperature = temperature
        self.delta = delta

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels are (B, H, W)."""
        prototypes = student.prototypes
        similarities = class_similarities(prototypes.means, prototypes.known, teacher.logits.shape[1], self.delta)
        loss = class_similarity_distillation(
            student.logits,
            teacher.logits,
            labels,
            similarities,
            temperature=self.temperature,
            align_corners=student.align_corners,
        )
        return self.loss_weight * loss

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}, temperature={self.temperature}, delta={self.delta}'
