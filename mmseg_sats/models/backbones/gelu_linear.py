# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A linear layer on GELU's values, which are computed again in the backward pass instead of kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_sats.functional.precision import full_precision


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = 'none') -> Tensor:
    """Computes ``F.linear(F.gelu(x), weight, bias)`` and keeps only ``x`` for the backward pass.

    GELU's values are a third of what SegFormer's feed-forward layer would keep, and cost little beside its products.

    Args:
        x: (..., C) the argument of GELU (arXiv:1606.08415).
        weight: (D, C)
        bias: (D,)
        approximate: as in ``F.gelu``.

    Returns:
        (..., D). Its gradient has no gradient of its own.
    """
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        # Without a Function of ours, so that a traced model has torch's operators only.
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)
    return _GeluLinear.apply(x, weight, bias, approximate)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        """The layer's output; keeps the argument and the weight."""
        ctx.save_for_backward(x, weight)
        ctx.approximate = approximate
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The gradients of those arguments that need one."""
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        # The products are in the precision of the forward pass, under autocast a lower one than the arguments'.
        with full_precision(grad):
            rows = grad.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                values = F.gelu(x, approximate=ctx.approximate).to(grad.dtype)
                of_weight = (rows.mT @ values.flatten(0, -2)).to(weight.dtype)
                del values
            if ctx.needs_input_grad[0]:
                # In place: a second array of this size would take longer to get than to fill.
                of_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
                torch.ops.aten.gelu_backward.grad_input(of_x, x, approximate=ctx.approximate, grad_input=of_x)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None
