# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""BARM's losses as parts of a segmentor's loss; the model must have ``background_residuals``."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.background_residual import (
    background_residual,
    output_distillation,
)
from mmseg_sats.functional.features.prototype_replay import masked_feature_mse
from mmseg_sats.functional.features.prototypes import labels_on_grid
from mmseg_sats.functional.precision import full_precision, working_dtype
from mmseg_sats.models.heads.linear_classifier import LinearClassifier
from mmseg_sats.models.losses.classifier import ClassifierLoss
from mmseg_sats.models.segmentor_output import SegmentorOutput


@MODELS.register_module()
class BackgroundResidualLoss(ClassifierLoss):
    """:func:`background_residual` of the stage's own residual, weighted.

    Args:
        background_weight: factor where there is no label of the stage, 5 published.
        new_weight: factor under labels of new classes, 1 published.
    """

    needs_residuals: ClassVar[bool] = True
    reduces_over_ranks: ClassVar[bool] = True

    def __init__(self, background_weight: float = 5.0, new_weight: float = 1.0) -> None:
        super().__init__()
        self.background_weight = background_weight
        self.new_weight = new_weight

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        residual = student.classifier.residual(student.classifier.features)[:, -1]
        small = labels_on_grid(labels, residual.shape[1:])
        background, new = background_residual(residual, small, teacher.logits.shape[1])
        return self.background_weight * background + self.new_weight * new

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'background_weight={self.background_weight}, new_weight={self.new_weight}'


@MODELS.register_module()
class OldOutputDistillationLoss(ClassifierLoss):
    """:func:`output_distillation` of r_0, the old classes and the earlier residuals, before background is put together.

    Args:
        loss_weight: factor of the loss, 1 published.
    """

    needs_residuals: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; the labels are not used."""
        old = teacher.classifier
        residuals = 0 if old.residual is None else old.residual.out_channels
        new, before = (_outputs(layer, len(old.weight), residuals) for layer in (student.classifier, old))
        return self.loss_weight * output_distillation(new, before)


def _outputs(layer: LinearClassifier, channels: int, residuals: int) -> Tensor:
    """The first channels, and the first residuals, of a classifier: (B, channels + residuals, h, w)."""
    weight, bias = layer.weight[:channels], layer.bias[:channels]
    if residuals:
        weight = torch.cat([weight, layer.residual.weight[:residuals].flatten(1)])
        bias = torch.cat([bias, layer.residual.bias[:residuals]])
    with full_precision(layer.features):
        dtype = working_dtype(layer.features, weight)
        rows = weight[:, :, None, None].to(dtype)
        return F.conv2d(layer.features.to(dtype), rows, bias.to(dtype))


@MODELS.register_module()
class BackgroundFeatureLoss(ClassifierLoss):
    """The squared error of the features before the classifier where the stage has no label, a mean over all positions.

    Args:
        loss_weight: factor of the loss, 4 published.
    """

    reduces_over_ranks: ClassVar[bool] = True

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W)."""
        features = student.classifier.features
        where = labels_on_grid(labels, features.shape[2:]) < teacher.logits.shape[1]
        loss = masked_feature_mse(features, teacher.classifier.features, where, over_all=True)
        return self.loss_weight * loss
