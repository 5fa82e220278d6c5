# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""UCD's distillation as a part of a segmentor's loss; ``mmseg_sats.functional`` has the function of the same name."""

from typing import ClassVar

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.contrastive import contrastive_distillation
from mmseg_sats.functional.features.prototypes import labels_on_grid, pixels_of
from mmseg_sats.functional.precision import full_precision, working_dtype
from mmseg_sats.functional.pseudo_labels.old_model import fill_background, old_labels
from mmseg_sats.models.parts import WeightedPart
from mmseg_sats.models.segmentor_output import SegmentorOutput


@MODELS.register_module()
class ContrastiveDistillationLoss(WeightedPart):
    """:func:`contrastive_distillation` of the pixels of foreground classes, on the grid of a block's features.

    The labels are resized to this grid by nearest neighbour, the old model's logits bilinearly. A background pixel
    gets the class that the old model predicts. Those that are background for the old model too, and those without a
    label, are left out.

    Args:
        loss_weight: factor of the loss, 0.01 in the released code.
        temperature: T, 0.07 in the released code.
        block: index of the encoder's block whose features are used; -1 is the last.
        max_pixels: how many pixels of a process are used at most, drawn by torch's global generator. The loss needs
            arrays of ``max_pixels`` times up to twice as many, and that again for each further process.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``max_pixels`` is less than 1.
    """

    reduces_over_ranks: ClassVar[bool] = True

    def __init__(
        self, loss_weight: float = 0.01, temperature: float = 0.07, block: int = -1, max_pixels: int = 2048
    ) -> None:
        super().__init__(loss_weight)
        if not temperature > 0:
            raise ValueError(f'ContrastiveDistillationLoss.temperature must be above 0, got {temperature}')
        if max_pixels < 1:
            raise ValueError(f'ContrastiveDistillationLoss.max_pixels must be at least 1, got {max_pixels}')
        self.temperature = temperature
        self.block = block
        self.max_pixels = max_pixels

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels are (B, H, W)."""
        new, old = student.features[self.block], teacher.features[self.block]
        logits = teacher.labelling_logits(new.shape[2:])
        with full_precision(logits):
            probabilities = logits.to(working_dtype(logits)).softmax(1)
        labels = labels_on_grid(labels, new.shape[2:])
        labels = fill_background(labels, old_labels(logits))
        chosen = self._choose((labels > 0) & (labels < student.logits.shape[1]))
        loss = contrastive_distillation(
            pixels_of(new, chosen),
            pixels_of(old, chosen),
            labels[chosen],
            pixels_of(probabilities, chosen),
            self.temperature,
        )
        return self.loss_weight * loss

    def _choose(self, where: Tensor) -> tuple[Tensor, ...]:
        """The indices of at most ``max_pixels`` of the places of a (B, h, w) mask, in their order."""
        places = where.nonzero()
        if len(places) > self.max_pixels:
            drawn = torch.randperm(len(places))[: self.max_pixels].sort().values
            places = places[drawn.to(places.device)]
        return tuple(places.T)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f'loss_weight={self.loss_weight}, temperature={self.temperature}, block={self.block}, '
            f'max_pixels={self.max_pixels}'
        )
