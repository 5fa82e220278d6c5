# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""BARM's classifier, in which every stage after the first has a residual of background.

Zhang and Gao, "Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic
Segmentation", ECCV 2024.
"""

import torch
from torch import Tensor, nn

from mmseg_sats.models.heads.split_classifier import SplitClassifier


class ResidualClassifier(SplitClassifier):
    """A classifier whose background is x_0 = r_0 + sum_k min(r_k, 0), with a residual r_k of every stage k >= 1.

    A stage can lower background where its own classes are, and cannot raise it. In training, x_0 is r_0 plus the
    earlier stages' min(r_k, 0), which get no gradient, plus this stage's r_t without the minimum, which would stop
    the gradient where r_t > 0.

    The ``state_dict`` has that of a convolution, with the row of r_0 as background's, and ``residual.weight`` and
    ``residual.bias`` with a row per residual.

    Args:
        in_channels: channels of the features.
        num_channels: K, background included.
        num_old: channels of the old model, background included.
        residuals: number of residuals, which is the index of the stage.
    """

    def __init__(self, in_channels: int, num_channels: int, num_old: int, residuals: int) -> None:
        super().__init__(in_channels, num_channels, num_old)
        self.residual = nn.Conv2d(in_channels, residuals, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) of features (B, in_channels, h, w)."""
        logits, residual = super().forward(x), self.residual(x)
        lowered = residual.clamp(max=0)
        if self.training:
            earlier = logits[:, :1] + lowered[:, :-1].sum(1, keepdim=True)
            background = earlier.detach() + residual[:, -1:]
        else:
            background = logits[:, :1] + lowered.sum(1, keepdim=True)
        return torch.cat([background, logits[:, 1:]], 1)
