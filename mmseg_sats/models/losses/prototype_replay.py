# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""STAR's losses as parts of a segmentor's loss; they read the :class:`ReplayPrototypes` of the old classes."""

from typing import ClassVar

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.prototype_replay import (
    masked_feature_mse,
    prototype_separation,
    rejected_background,
    replayed,
)
from mmseg_sats.functional.features.prototypes import labels_on_grid
from mmseg_sats.functional.pseudo_labels.old_model import old_labels
from mmseg_sats.models.losses.classifier import ClassifierLoss
from mmseg_sats.models.prototypes import completed_on_grid
from mmseg_sats.models.segmentor_output import SegmentorOutput


@MODELS.register_module()
class PrototypeReplayLoss(ClassifierLoss):
    """The old classes and background as negatives of the new classes, as often as in all stages so far.

    With L the segmentation loss, r the sum of the ``shares`` of the old classes, and b ``background_share`` times the
    share of background among the batch's positions, the two together are

        (L + sum_c share_c E_c + b E_0) / (1 + r + b)

    E_c is the mean of BCE(x_new, 0) over drawn features of class c, E_0 that over the positions of background, and
    x_new are the logits of the new classes. This part is the sum without L / (1 + r + b), and the images' weights in
    the segmentation loss are 1 / (1 + r + b). Background are the positions without a label for which the old model
    predicts it. (STAR)

    Args:
        most: how many features of old classes a process draws for a batch at most; more are stood for by these.

    Raises:
        ValueError: ``most`` is less than 1.
    """

    needs_prototypes: ClassVar[bool] = True
    reduces_over_ranks: ClassVar[bool] = True

    def __init__(self, most: int = 20000) -> None:
        super().__init__()
        if most < 1:
            raise ValueError(f'PrototypeReplayLoss.most must be at least 1, got {most}')
        self.most = most

    def image_weights(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """1 / (1 + r + b) for each of the B images."""
        with torch.no_grad():
            _, added = self._background(student, teacher, labels)
        return (1 / (1 + added)).expand(len(labels))

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The loss, a scalar; labels (B, H, W)."""
        background, added = self._background(student, teacher, labels)
        old, classifier = student.prototypes, student.classifier
        rows = slice(teacher.logits.shape[1], None)
        loss = replayed(
            old.statistics, old.shares, classifier.weight[rows], classifier.bias[rows],
            classifier.features[:, 0].numel(), self.most,
        )
        return (loss + background) / (1 + added)

    def _background(
        self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The background's weighted loss, and r + b."""
        classifier, prototypes = student.classifier, student.prototypes
        rows = slice(teacher.logits.shape[1], None)
        loss, share = rejected_background(
            classifier.features, completed_on_grid(labels, teacher.logits) == 0, classifier.weight[rows],
            classifier.bias[rows],
        )
        weight = prototypes.background_share(len(classifier.bias[rows]))
        return weight * loss, weight * share + prototypes.shares.sum().to(share)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'most={self.most}'


@MODELS.register_module()
class PseudoLabelFeatureLoss(ClassifierLoss):
    """:func:`masked_feature_mse` where a pixel has no label and the old model predicts an old class.

    The features are those before the classifier of both models.

    Args:
        loss_weight: factor of the loss, 5 published.
    """

    reduces_over_ranks: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        old = old_labels(teacher.logits) > 0
        where = old & (labels_on_grid(labels, old.shape[1:]) == 0)
        return self.loss_weight * masked_feature_mse(student.classifier.features, teacher.classifier.features, where)


@MODELS.register_module()
class PrototypeSeparationLoss(ClassifierLoss):
    """:func:`prototype_separation` of the batch's new classes from the old classes' prototypes.

    Args:
        loss_weight: factor of the loss, 0.05 published.
    """

    needs_prototypes: ClassVar[bool] = True
    reduces_over_ranks: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        features = student.classifier.features
        small = labels_on_grid(labels, features.shape[2:])
        prototypes = student.prototypes.statistics.prototypes
        return self.loss_weight * prototype_separation(features, small, prototypes, teacher.logits.shape[1])
