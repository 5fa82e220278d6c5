# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A frozen model for autocast, whose weights are cast only once instead of in every step.

Autocast caches a cast weight for one step at most, and that of a frozen model not at all. On a GPU, more
than half of the kernels of such a forward pass would be casts.
"""

import copy

import torch
from torch import nn
from torch.amp.autocast_mode import is_autocast_available  # torch.amp has it since torch 2.5

_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses on the device, or None if autocast is off."""
    if is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def with_cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in which the float32 weights of linear, convolution and attention layers have ``dtype``.

    The weights of norms and other layers keep their dtype, because autocast does not cast them.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _PRODUCTS):
            own = list(module.parameters(recurse=False))
        elif isinstance(module, nn.MultiheadAttention):
            own = [module.in_proj_weight, module.in_proj_bias]
        else:
            continue
        for parameter in own:
            if parameter is not None and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
    return model
