# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Classifiers that grow: from the old model's channels to those of the present stage.

All of mmseg's decode heads built on ``BaseDecodeHead`` end in ``conv_seg``, a 1x1 convolution with one
row per class. Growing happens on the checkpoint, while it is loaded, so every head is built at its final
size and nothing else of the model has to know.
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
    probability: at the start, the grown model says "background or new" just where the old one said
    "background".
    """
    weight, bias = (rows.clone() for rows in old)
    num_new = fresh[0].shape[0] - weight.shape[0]
    bias[0] -= math.log(num_new + 1)
    new_weight = weight[:1].expand(num_new, *weight.shape[1:])
    return torch.cat([weight, new_weight]), torch.cat([bias, bias[:1].expand(num_new)])


def _random(old: Rows, fresh: Rows, unknown: Rows | None) -> Rows:
    """New rows keep the initial values that the head gave them."""
    weight, bias = (rows.clone() for rows in fresh)
    weight[: old[0].shape[0]], bias[: old[1].shape[0]] = old
    return weight, bias


def _from_unknown(old: Rows, fresh: Rows, unknown: Rows | None) -> Rows:
    """New classes begin as the unknown class, of which they were a part (SSUL, section 3.2)."""
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
    """Raises TypeError if ``head`` has more per class than the rows of ``conv_seg``, or not even those.

    Args:
        name: the head's name in the segmentor, for the message.
        head: a decode or auxiliary head.
        cfg: the config it was built from. With it the head is built once more for one class more,
            which tells what else grows with the classes.
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
    """The tensors of ``head``, its classifier aside, whose shape one class more would change."""
    cfg = copy.deepcopy(dict(cfg, num_classes=head.num_classes + 1))
    cfg.pop('out_channels', None)
    with torch.random.fork_rng(devices=[]):  # The run's random numbers stay as they were.
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
    """Grows the rows of one classifier in a checkpoint, in place.

    A checkpoint whose classifier already has the head's size is left alone.

    Args:
        state_dict: the checkpoint's tensors; ``{prefix}conv_seg.weight`` is (num_old, C, 1, 1) and
            ``{prefix}conv_seg.bias`` (num_old,).
        prefix: the head's prefix in ``state_dict``, e.g. ``'decode_head.'``.
        head: the head that will be loaded; gives the final number of rows.
        num_old: channels of the old model, background included.
        init: ``'balanced'`` (MiB), ``'random'`` (the head's own initial values) or ``'unknown'``
            (SSUL: the rows ``{prefix}conv_seg.unknown.*`` of the checkpoint).

    Raises:
        ValueError: there is no such ``init``, or it needs an unknown class that is not there.
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
    """Puts a background channel in front of a classifier that was trained without one, in place.

    The new row is the mean of all class rows. The softmax over the old classes does not change, and
    since a mean never exceeds the largest value, background is predicted nowhere until training
    teaches it.

    Args:
        state_dict: the checkpoint's tensors.
        prefix: the head's prefix, e.g. ``'decode_head.'``; a list of auxiliary heads may share one.
    """
    classifiers = ('conv_seg.weight', 'conv_seg.bias')
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(classifiers)]:
        rows = state_dict[key]
        state_dict[key] = torch.cat([rows.mean(dim=0, keepdim=True), rows])


def shape_mismatches(
    state_dict: Mapping[str, Tensor], module: nn.Module, prefix: str = ''
) -> list[str]:
    """One line per tensor of ``module`` that the checkpoint holds in another shape.

    mmengine only logs such a mismatch and goes on with random weights; the callers raise instead.
    """
    own = {prefix + key: value for key, value in module.state_dict().items()}
    return [
        f'{key}: {tuple(state_dict[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model'
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
