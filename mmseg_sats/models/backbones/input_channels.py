# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How many bands the images of a model have."""

from torch import nn


def input_channels(model: nn.Module) -> int:
    """The bands of the images that a segmentor takes: those of its backbone's first convolution, 3 without one."""
    first = next((part for part in model.backbone.modules() if isinstance(part, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels
