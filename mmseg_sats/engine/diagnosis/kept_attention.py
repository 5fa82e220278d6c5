# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How far a stage moved the attention of each class: the terms of the attention loss L_a, eq. (2) of SATS."""

from typing import Any

import torch
from torch import Tensor

from mmseg_sats.engine.diagnosis.classifier_rows import NotMeasurableError
from mmseg_sats.functional.features.region_distances import DISTANCES, POOLINGS, LabelGrids, grid_of
from mmseg_sats.visualization.attention_view import padded_attentions
from mmseg_sats.visualization.stage_model import StageModel


class KeptAttention:
    """Sums, over images, the distances between the attention of each class region in two models.

    Args:
        old: the stage before.
        new: the stage.

    Raises:
        NotMeasurableError: a backbone cannot name its queries and keys.
    """

    def __init__(self, old: StageModel, new: StageModel) -> None:
        for stage in (old, new):
            if not hasattr(stage.model.backbone, 'forward_with_attention'):
                raise NotMeasurableError(f'{type(stage.model.backbone).__name__} gives no self-attention')
        self.models = old, new
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    @torch.no_grad()
    def add(self, sample: dict[str, Any]) -> None:
        """Adds an image with labels, as the test pipeline packs it."""
        labels = sample['data_samples'].gt_sem_seg.data[0].long()
        (old, new), _, labels = padded_attentions(*self.models, sample, labels)
        channels = len(self.models[1].classes)
        labels = labels[None].to(new[0].tensors[0].device)
        grids = LabelGrids(labels, 255, channels, [grid_of(block) for block in new])
        if self.sums is None:
            self.sums = torch.zeros(len(new), channels, dtype=torch.float64)
            self.counts = torch.zeros(len(new), channels, dtype=torch.int64)
        for row, blocks in enumerate(zip(new, old, strict=True)):
            distances = POOLINGS['class'](*blocks, grids, DISTANCES['l2'])
            present = distances.presence[0].nonzero().flatten()
            # One for each region, and 0 behind them where another block's grid shows more classes.
            self.sums[row, present] += distances.values[0].mean(0)[: len(present)].double().cpu()
            self.counts[row, present] += 1

    def by_class(self) -> dict[str, list[float | None]]:
        """The mean distance in each block over the images that show a class on the block's grid, by the class's name.

        None where no image does.
        """
        if self.sums is None:
            return {}
        means = (self.sums / self.counts).T.tolist()
        return {
            name: [None if value != value else value for value in row]
            for name, row in zip(self.models[1].classes[1:], means[1:], strict=True)
        }
