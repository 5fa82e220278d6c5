# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Makes the losses of a distributed run equal to those that one process would compute of the whole batch.

Every process has a share of the batch. Let f be a loss of the whole batch. If each process returns the
value of f, computed from sums over all processes, and f depends on the process's share only through
:func:`sum_over_ranks`, then the mean of the processes' gradients is the gradient of f. This mean is what
``DistributedDataParallel`` gives to the optimizer. Shares may have different sizes, and a share may
lack, for instance, the class that f is about.

With a single process, these functions return their arguments unchanged.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """The number of this process among them, from 0 on."""
    return dist.get_rank() if get_world_size() > 1 else 0


def all_reduce(value: Tensor, op: str = 'sum') -> None:
    """Replaces the processes' tensors by their sum or, with ``'max'``, by their element-wise maximum."""
    if get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX if op == 'max' else dist.ReduceOp.SUM)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone()
        all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # All processes compute the same from the sum, so `grad` is the same on all. DDP averages the gradients
        # afterwards although their sum is needed, hence the factor.
        return grad * get_world_size()


class _Max(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        largest = value.detach().clone()
        all_reduce(largest, 'max')
        ctx.save_for_backward(value == largest)
        return largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # `grad` is the gradient through this process's share only; the process that has the maximum needs the sum.
        (owned,) = ctx.saved_tensors
        both = torch.stack([grad, owned.to(grad.dtype)])
        all_reduce(both)
        return both[0] / both[1] * owned


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of the processes' tensors, which must have one shape; for its gradient see the module's docstring."""
    return value if get_world_size() == 1 else _Sum.apply(value)


def max_over_ranks(value: Tensor) -> Tensor:
    """The element-wise maximum of the processes' tensors; the gradient goes to the processes that have it."""
    return value if get_world_size() == 1 else _Max.apply(value)


def gather_over_ranks(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes' tensors (n, d), in the order of the processes, and the place of the own first row.

    The numbers n may differ. The result has no gradient on several processes.
    """
    if get_world_size() == 1:
        return rows, 0
    numbers = torch.zeros(get_world_size(), dtype=torch.long, device=rows.device)
    numbers[get_rank()] = len(rows)
    all_reduce(numbers)
    first = int(numbers[: get_rank()].sum())
    result = rows.new_zeros(int(numbers.sum()), rows.shape[1])
    result[first : first + len(rows)] = rows.detach()
    all_reduce(result)
    return result, first


def labels_over_ranks(labels: Tensor) -> list[int]:
    """The labels, from 0 to 255, that occur in the batch on any process, in ascending order."""
    if get_world_size() == 1:
        return labels.unique().tolist()
    present = (torch.bincount(labels.flatten(), minlength=256) > 0).int()
    all_reduce(present, 'max')
    return present.nonzero().flatten().tolist()


def mean_over_ranks(
    means: Mapping[str, Tensor], counts: Mapping[str, Tensor | int]
) -> dict[str, Tensor]:
    """Computes the means over the whole batch from each process's means over its share.

    Args:
        means: name to a mean, a tensor of one element; the same names in the same order on all processes.
        counts: name to the number of items (e.g. pixels) that the mean is over, 0 or more. A mean over 0
            items has no effect, but must not be NaN or infinite.

    Returns:
        Name to scalar, the same on all processes; 0 if there are no items on any process.
    """
    if get_world_size() == 1 or not means:
        return dict(means)
    values = torch.stack([value.mean().double() for value in means.values()])
    weights = torch.stack(
        [torch.as_tensor(counts[name], device=values.device).double() for name in means]
    )
    sums, total = sum_over_ranks(torch.stack([values * weights, weights]))
    results = sums / total.clamp(min=1)
    return {
        name: result.to(means[name].dtype) for name, result in zip(means, results, strict=True)
    }
