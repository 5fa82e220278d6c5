# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A classifier with a second set of rows, which are computed in closed form instead of trained.

"C-RLS" of CFSSeg (SegACIL), ACM MM 2025: the features are expanded by a fixed random layer, and the rows over the
expansion are those of a ridge regression.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_sats.functional.precision import full_precision

ROWS, EXPANSION = 'closed_form', 'expansion'  # the buffers' names


class ClosedFormClassifier(nn.Conv2d):
    """``conv_seg`` with a second set of rows, over ``relu(R f)`` of its input f with a fixed random R.

    In training, and as long as the second rows are all 0, it is the ordinary classifier. ``weight`` and ``bias`` are
    those of mmseg's ``conv_seg``; R and the second rows are buffers, so that no optimizer changes them.

    Args:
        in_channels: channels of the features.
        num_channels: K, background included.
        width: D, channels of the expansion.
        seed: of R, whose entries are normal with variance 1 / in_channels.

    Raises:
        ValueError: the width is not a whole number from 1.
    """

    def __init__(self, in_channels: int, num_channels: int, width: int = 8192, seed: int = 0) -> None:
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f'closed_form.width={width!r}: expected a whole number from 1')
        super().__init__(in_channels, num_channels, 1)
        generator = torch.Generator('cpu').manual_seed(seed)
        expansion = torch.randn(width, in_channels, generator=generator, device='cpu') / math.sqrt(in_channels)
        self.register_buffer(EXPANSION, expansion.to(self.weight.device))
        self.register_buffer(ROWS, torch.zeros(num_channels, width))
        self.fitted = False

    def expand(self, features: Tensor) -> Tensor:
        """(B, D, h, w) of features (B, in_channels, h, w), outside of autocast."""
        with full_precision(features):
            features = features.to(self.expansion.dtype)
            return F.conv2d(features, self.expansion[:, :, None, None]).relu()

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K, h, w) of features (B, in_channels, h, w)."""
        if self.training or not self.fitted:
            return super().forward(features)
        with full_precision(features):
            return F.conv2d(self.expand(features), self.closed_form[:, :, None, None])

    def set_rows(self, rows: Tensor) -> None:
        """Takes (K, D) as the second rows, which give the logits outside of training from now on."""
        self.closed_form.copy_(rows)
        self.fitted = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.fitted = not self.closed_form.is_meta and bool(self.closed_form.any())
