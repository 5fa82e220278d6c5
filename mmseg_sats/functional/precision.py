# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The precision of losses and attention, which does not depend on autocast."""

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context that turns autocast off on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The tensors' common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
