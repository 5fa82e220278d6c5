# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Classifiers that grow from the old model's channels to those of the current stage.

All of mmseg's decode heads built on ``BaseDecodeHead`` end in ``conv_seg``, a 1x1 convolution with one
row per channel. The rows are added to the checkpoint while it is loaded. So every head is built with its
final size, and no other part of the model is involved.
"""

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.utils.spelling import check_choice

Rows = tuple[Tensor, Tensor]


def _balanced(old: Rows, fresh: Rows, unknown: Rows | None) -> Rows:
    """MiB's balanced initialisation (Cermelli et al., CVPR 2020, eq. (9) and (10)).

    New classes take over the background's weight, and background and new classes share its
    probability. So at the start, the probabilities of background and new classes add up to the old
    model's probability of background.
    """
    weight, bias = (rows.clone() for rows in old)
    num_new = fresh[0].shape[0] - weight.shape[0]
    bias[0] -= math.log(num_new + 1)
    new_weight = weight[:1].expand(num_new, *weight.shape[1:])
    return torch.cat([weight, new_weight]), torch.cat([bias, bias[:1].expand(num_new)])


def _random(old: Rows, fresh: Rows, unknown: Rows | None) -> Rows:
    """New rows keep the head's own initial values."""
    weight, bias = (rows.clone() for rows in fresh)
    weight[: old[0].shape[0]], bias[: old[1].shape[0]] = old
    return weight, bias


def _from_unknown(old: Rows, fresh: Rows, unknown: Rows | None) -> Rows:
    """New classes start as copies of the unknown class, which they were a part of so far (SSUL, section 3.2)."""
    if unknown is None:
        raise ValueError("classifier_init='unknown' needs a checkpoint with an unknown class")
    num_new = fresh[0].shape[0] - old[0].shape[0]
    return tuple(torch.cat([rows, *[row] * num_new]) for rows, row in zip(old, unknown, strict=True))


CLASSIFIER_INITS: dict[str, Callable[[Rows, Rows, Rows | None], Rows]] = {
    'balanced': _balanced,
    'random': _random,
    'unknown': _from_unknown,
}


def check_head_can_grow(
    name: str, head: nn.Module, cfg: Mapping[str, Any] | None = None
) -> None:
    """Raises TypeError unless the rows of ``conv_seg`` are all that depends on the number of classes in ``head``.

    Args:
        name: the head's name in the segmentor, for the message.
        head: a decode or auxiliary head.
        cfg: the config that the head was built from. If it is given, the head is built again with one
            more class, to find other tensors that grow with the classes.
    """
    conv_seg = getattr(head, 'conv_seg', None)
    if not isinstance(conv_seg, nn.Conv2d) or conv_seg.out_channels != head.num_classes:
        raise TypeError(
            f"{name} ({type(head).__name__}) cannot grow: expected a head on mmseg's BaseDecodeHead whose "
            f'classifier `conv_seg` has one output channel per class ({head.num_classes}), got {conv_seg}'
        )
    others = [] if cfg is None else _grows_beside_classifier(head, cfg)
    if others:
        raise TypeError(
            f'{name} ({type(head).__name__}) cannot grow: its size depends on the number of classes beside '
            f'the classifier `conv_seg`, in {", ".join(others)}; expected a head without such parts'
        )


def _grows_beside_classifier(head: nn.Module, cfg: Mapping[str, Any]) -> list[str]:
    """The tensors of ``head``, except its classifier, whose shape would change with one more class."""
    cfg = copy.deepcopy(dict(cfg, num_classes=head.num_classes + 1))
    cfg.pop('out_channels', None)
    with torch.random.fork_rng(devices=[]):  # does not change the run's random numbers
        larger = MODELS.build(cfg).state_dict()
    own = {
        key: tensor.shape
        for key, tensor in head.state_dict().items()
        if not key.startswith('conv_seg.')
    }
    return [
        f'{key} {tuple(shape)}'
        for key, shape in own.items()
        if key not in larger or larger[key].shape != shape
    ]


def grow_classifier(
    state_dict: MutableMapping[str, Tensor], prefix: str, head: nn.Module, num_old: int, init: str
) -> None:
    """Adds rows for the new classes to a classifier in a checkpoint, in place.

    A checkpoint whose classifier already has the head's size is not changed.

    Args:
        state_dict: the checkpoint's tensors; ``{prefix}conv_seg.weight`` is (num_old, C, 1, 1) and
            ``{prefix}conv_seg.bias`` (num_old,).
        prefix: the head's prefix in ``state_dict``, e.g. ``'decode_head.'``.
        head: the head that the checkpoint is loaded into; it has the final number of rows.
        num_old: channels of the old model, background included.
        init: ``'balanced'`` (MiB), ``'random'`` (the head's own initial values) or ``'unknown'``
            (SSUL: the rows ``{prefix}conv_seg.unknown.*`` of the checkpoint).

    Raises:
        ValueError: ``init`` is unknown, or it needs an unknown class that the checkpoint does not have.
    """
    check_choice('classifier_init', init, CLASSIFIER_INITS)
    keys = [f'{prefix}conv_seg.weight', f'{prefix}conv_seg.bias']
    if any(key not in state_dict for key in keys) or state_dict[keys[0]].shape[0] != num_old:
        return
    conv_seg = head.conv_seg
    if conv_seg.out_channels == num_old:
        return
    old = tuple(state_dict[key] for key in keys)
    own = conv_seg.state_dict()
    fresh = tuple(own[kind].to(old[0].device) for kind in ('weight', 'bias'))
    unknown_keys = [f'{prefix}conv_seg.unknown.{kind}' for kind in ('weight', 'bias')]
    unknown = tuple(state_dict[key] for key in unknown_keys if key in state_dict) or None
    state_dict[keys[0]], state_dict[keys[1]] = CLASSIFIER_INITS[init](old, fresh, unknown)


def add_background(state_dict: MutableMapping[str, Tensor], prefix: str) -> None:
    """Adds a background channel at index 0 to a classifier that was trained without one, in place.

    The new row is the mean of all class rows. The softmax over the old classes does not change. Since a
    mean never exceeds the largest value, background is not predicted anywhere before training.

    Args:
        state_dict: the checkpoint's tensors.
        prefix: the head's prefix, e.g. ``'decode_head.'``; the heads of a list of auxiliary heads share it.
    """
    classifiers = ('conv_seg.weight', 'conv_seg.bias')
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(classifiers)]:
        rows = state_dict[key]
        state_dict[key] = torch.cat([rows.mean(dim=0, keepdim=True), rows])


def shape_mismatches(
    state_dict: Mapping[str, Tensor], module: nn.Module, prefix: str = ''
) -> list[str]:
    """A line of text for each tensor of ``module`` that has another shape in the checkpoint.

    mmengine only logs such a mismatch and keeps random weights; the callers raise an error instead.
    """
    own = {prefix + key: value for key, value in module.state_dict().items()}
    return [
        f'{key}: {tuple(state_dict[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model'
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
