# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Turns the losses of a segmentor's share of a batch into those of the whole batch.

How this is done for a single loss, and the functions for a loss of one's own, are in
``mmseg_sats.functional.over_ranks``.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mmseg_sats.functional.over_ranks import (
    get_world_size,
    labels_over_ranks,
    max_over_ranks,
    mean_over_ranks,
    sum_over_ranks,
)
from mmseg_sats.models.parts import DistillationPart, flag

__all__ = ['labels_over_ranks', 'losses_over_ranks', 'max_over_ranks', 'mean_over_ranks', 'sum_over_ranks']


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
        losses: by mmseg's names: ``PREFIX.loss_NAME`` for a head, ``PREFIX.OUTPUT.loss_NAME`` for a head with
            several outputs, ``loss_NAME`` for a part.
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
        prefix, own = name.partition('.')[0], name.rpartition('.')[2]  # a head may name its outputs between them
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
