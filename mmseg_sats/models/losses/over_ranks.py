# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Makes the losses of a distributed run equal to those that one process would compute of the whole batch.

Every process has a share of the batch. Let f be a loss of the whole batch. If each process returns the
value of f, computed from sums over all processes, and f depends on the process's share only through
:func:`sum_over_ranks`, then the mean of the processes' gradients is the gradient of f. This mean is what
``DistributedDataParallel`` gives to the optimizer. Shares may have different sizes, and a share may
lack, for instance, the class that f is about.

With a single process, these functions return their arguments unchanged.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmseg_sats.models.parts import DistillationPart, flag


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


def losses_over_ranks(
    losses: Mapping[str, Any],
    heads: Mapping[str, nn.Module],
    parts: Mapping[str, Callable[..., Tensor]],
    labels: Tensor,
) -> dict[str, Any]:
    """Turns a segmentor's losses of its share of a batch into those of the whole batch.

    A loss is taken to be a mean over all pixels of the batch (or over its images, which is the same for
    images of one size), with two exceptions. A head's loss whose ``avg_non_ignore`` is True, which is
    possible for mmseg's ``CrossEntropyLoss``, is a mean over the pixels that are not ignored, and so is
    ``acc_seg``. A part whose ``reduces_over_ranks`` is True already returns the loss of the whole batch.

    Args:
        losses: by mmseg's names: ``PREFIX.loss_NAME`` for a head, ``loss_NAME`` for a part.
        heads: prefix to head.
        parts: name to part, for the losses beside those of the heads.
        labels: (B, H, W), the labels that the heads were trained on.

    Returns:
        The losses by the same names. Values that are no tensors are not changed.
    """
    if get_world_size() == 1:
        return dict(losses)
    by_name = {f'loss_{name}': part for name, part in parts.items()}
    counts: dict[str, Tensor | int] = {}
    for name, value in losses.items():
        prefix, _, own = name.rpartition('.')
        part = by_name.get(name)
        if not isinstance(value, Tensor) or (part is not None and flag(part, 'reduces_over_ranks', DistillationPart)):
            continue
        labelled = prefix in heads and own in _over_labelled_pixels(heads[prefix])
        counts[name] = (
            (labels != heads[prefix].ignore_index).sum() if labelled else labels.numel()
        )
    return {**losses, **mean_over_ranks({name: losses[name] for name in counts}, counts)}


def _over_labelled_pixels(head: nn.Module) -> set[str]:
    """The names of a head's losses, and ``acc_seg``, that are means over the pixels that are not ignored."""
    own = head.loss_decode
    modules = own if isinstance(own, nn.ModuleList) else [own]
    names = {module.loss_name for module in modules if getattr(module, 'avg_non_ignore', False)}
    return names | {'acc_seg'}
