# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A frozen model for autocast: what autocast would cast in every step is cast once.

Autocast keeps what it cast of a weight within one step at most, and casts those of a frozen model at
every use: on a GPU more than half of what such a forward pass launches.
"""

import copy

import torch
from torch import nn

_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast works in on the device, None where it is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def with_cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose float32 weights of products and convolutions are of ``dtype``.

    Those of norms and the rest stay: there autocast works in float32, or in what it is given.
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
