# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses of a batch that several processes share: what one process would compute of the whole batch.

Every process sees a share of a batch. Let f be a loss of the whole batch. If each process returns
the value of f, computed from sums over all of them, and if its own share reaches f through
:func:`sum_over_ranks` alone, then the mean of the processes' gradients, which is what
``DistributedDataParallel`` hands to the optimizer, is the gradient of f. Shares may be of different
sizes, and a share may lack what f is about.

Without a process group, or alone in it, all of this returns what it is given.
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
        # All compute the same of the same sum, so `grad` is known without asking the others; the
        # gradients are averaged afterwards, where a sum is wanted.
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
        # Here each process knows what its own share makes of the maximum, and the owner needs it all.
        (owned,) = ctx.saved_tensors
        both = torch.stack([grad, owned.to(grad.dtype)])
        all_reduce(both)
        return both[0] / both[1] * owned


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of the processes' tensors, of one shape on all of them; see the module for its gradient."""
    return value if get_world_size() == 1 else _Sum.apply(value)


def max_over_ranks(value: Tensor) -> Tensor:
    """The element-wise maximum of the processes' tensors; the gradient goes to those that have it."""
    return value if get_world_size() == 1 else _Max.apply(value)


def labels_over_ranks(labels: Tensor) -> list[int]:
    """The labels, 0 to 255 each, that the batch holds on any process, in ascending order."""
    if get_world_size() == 1:
        return labels.unique().tolist()
    present = (torch.bincount(labels.flatten(), minlength=256) > 0).int()
    all_reduce(present, 'max')
    return present.nonzero().flatten().tolist()


def mean_over_ranks(
    means: Mapping[str, Tensor], counts: Mapping[str, Tensor | int]
) -> dict[str, Tensor]:
    """The means over the whole batch, from each process's means over its share.

    Args:
        means: name to a mean, of one element; the same names in the same order on all processes.
        counts: name to how many things (pixels, say) the mean is over, 0 or more. A mean over none
            counts for nothing, and must be a number.

    Returns:
        Name to scalar, the same on all processes: 0 where there is nothing on any.
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
    """A segmentor's losses of its share of a batch, turned into those of the whole batch.

    A loss is taken for a mean over all pixels of the batch (or, which is the same for images of one
    size, over its images), with two exceptions: a head's loss with a true ``avg_non_ignore``, as
    mmseg's ``CrossEntropyLoss`` may have, is one over the pixels that have a label, as is ``acc_seg``;
    and a part with a true ``reduces_over_ranks`` is that of the whole batch already.

    Args:
        losses: names as mmseg gives them: ``PREFIX.loss_NAME`` of a head, ``loss_NAME`` of a part.
        heads: prefix to head.
        parts: name to part, the losses beside those of the heads.
        labels: (B, H, W), what the heads were trained on.

    Returns:
        The same names. What is no tensor is left as it is.
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
    """The names of a head's figures that are means over the pixels that are not ignored."""
    own = head.loss_decode
    modules = own if isinstance(own, nn.ModuleList) else [own]
    names = {module.loss_name for module in modules if getattr(module, 'avg_non_ignore', False)}
    return names | {'acc_seg'}
