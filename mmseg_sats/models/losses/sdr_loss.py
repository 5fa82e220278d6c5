# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SDR's losses as parts of a segmentor's loss; ``mmseg_sats.functional`` has the functions of the same names."""

from typing import ClassVar

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.prototypes import (
    prototype_attraction,
    prototype_matching,
    repulsion,
    sparsity,
)
from mmseg_sats.functional.pseudo_labels.old_model import old_labels
from mmseg_sats.models.parts import WeightedPart
from mmseg_sats.models.segmentor_output import SegmentorOutput


class _FeatureLoss(WeightedPart):
    """The base class of the four losses."""

    needs_teacher: ClassVar[bool] = False
    reduces_over_ranks: ClassVar[bool] = True


@MODELS.register_module()
class PrototypeMatchingLoss(_FeatureLoss):
    """:func:`prototype_matching` on the background pixels for which the old model predicts an old class.

    Args:
        loss_weight: factor of the loss, 0.01 published.
    """

    needs_teacher: ClassVar[bool] = True
    needs_prototypes: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        prototypes = student.prototypes
        old = old_labels(teacher.labelling_logits(labels.shape[-2:])).masked_fill(labels != 0, 0)
        feature = student.features[prototypes.block]
        # `old` is background on pixels with a label, so they are left out: background has no prototype.
        loss = prototype_matching(feature, old, prototypes.means, prototypes.known)
        return self.loss_weight * loss


@MODELS.register_module()
class PrototypeAttractionLoss(_FeatureLoss):
    """:func:`prototype_attraction` on the labels' classes.

    Args:
        loss_weight: factor of the loss, 0.001 published.
    """

    needs_prototypes: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        prototypes = student.prototypes
        feature = student.features[prototypes.block]
        loss = prototype_attraction(feature, labels, prototypes.means, prototypes.known)
        return self.loss_weight * loss


@MODELS.register_module()
class RepulsionLoss(_FeatureLoss):
    """:func:`repulsion` of the labels' classes, background included.

    Args:
        loss_weight: factor of the loss, 0.001 published.
        block: index of the encoder's block whose features are used; -1 is the last.
    """

    def __init__(self, loss_weight: float = 1.0, block: int = -1) -> None:
        super().__init__(loss_weight)
        self.block = block

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        return self.loss_weight * repulsion(student.features[self.block], labels)


@MODELS.register_module()
class SparsityLoss(_FeatureLoss):
    """:func:`sparsity` of all pixels that are not ignored.

    Args:
        loss_weight: factor of the loss, 0.001 published.
        block: index of the encoder's block whose features are used; -1 is the last.
    """

    def __init__(self, loss_weight: float = 1.0, block: int = -1) -> None:
        super().__init__(loss_weight)
        self.block = block

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        return self.loss_weight * sparsity(student.features[self.block], labels)
