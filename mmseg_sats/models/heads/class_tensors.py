# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Finds the tensors of a head that have a row for each class.

There is no table of heads: a head is built again with one more class, and the tensors that became larger by
one are those that grow with the classes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import nn

_NO_CLASSIFIER = 'it does not classify each pixel by logits of the classes'
# Heads of mmseg that need more than an image's features and labels, or are trained for something else.
_REFUSED: dict[str, str] = {
    'PointHead': 'its layers take a map of each class, and it is trained on points instead of label maps',
    'BaseCascadeDecodeHead': 'it needs the output of another head; expected both as heads of a CascadeHead',
    'PIDHead': 'its loss needs maps of edges, which completed labels do not have',
    'STDCHead': 'it predicts boundaries instead of the classes; leave it out by model = dict(auxiliary_head=None)',
    'IterativeDecodeHead': _NO_CLASSIFIER,
    'MaskFormerHead': _NO_CLASSIFIER,
    'Mask2FormerHead': _NO_CLASSIFIER,
    'SideAdapterCLIPHead': _NO_CLASSIFIER,
    'VPDDepthHead': _NO_CLASSIFIER,
}


def check_kind(name: str, cfg: Mapping[str, Any], after_another: bool = False) -> None:
    """Raises TypeError if a head is of a kind of mmseg's that cannot grow, for heads that are not built yet.

    Args:
        name: the head's name in the segmentor, for the message.
        cfg: its config.
        after_another: whether it gets the output of another head.
    """
    for index, head in enumerate(cfg.get('heads', ())):  # of a CascadeHead
        check_kind(f'{name}.{index}', head, after_another=index > 0)
    kind = MODELS.get(cfg['type']) if isinstance(cfg.get('type'), str) else cfg.get('type')
    names = {cls.__name__ for cls in getattr(kind, '__mro__', ())}
    if after_another:
        names.discard('BaseCascadeDecodeHead')
    for refused, reason in _REFUSED.items():
        if refused in names:
            raise TypeError(_cannot(name, kind, reason))


def _cannot(name: str, kind: type, reason: str) -> str:
    return f"{name} ({kind.__name__}) cannot grow: {reason} (docs/own_data.md lists mmseg's heads)"


def class_tensors(name: str, head: nn.Module, cfg: Mapping[str, Any]) -> dict[str, int]:
    """The tensors of a head that have a row for each class.

    Args:
        name: the head's name in the segmentor, for the messages.
        head: a decode or auxiliary head.
        cfg: the config that it was built from.

    Returns:
        The tensor's name in ``state_dict`` to the dimension of the classes: the first one, or, in a parameter of
        the head itself, the first that is not of size 1 (class tokens are (1, K, C)).

    Raises:
        TypeError: the head cannot grow, because it has no such tensor, not one output channel for each class, or
            another tensor whose shape depends on the number of classes, or it is trained for something else.
    """
    check_kind(name, dict(type=type(head)))
    num_classes = getattr(head, 'num_classes', None)
    channels = getattr(head, 'out_channels', num_classes)
    reason = ''
    if num_classes is None:
        reason = 'it has no number of classes'
    elif channels != num_classes:
        reason = f'it has {channels} output channel for {num_classes} classes; expected num_classes alone'
    found, others = ({}, []) if reason else _compare(head, cfg)
    if others:
        reason = f'in {", ".join(others[:5])}, its shape depends on the number of classes, but not by a row for each'
    elif not (found or reason):
        reason = f'none of its tensors has a row for each of its {num_classes} classes'
    if reason:
        raise TypeError(_cannot(name, type(head), reason))
    return found


def _compare(head: nn.Module, cfg: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The tensors with a row for each class, and a text for each other one whose shape depends on their number."""
    num_classes = head.num_classes
    cfg = copy.deepcopy(dict(cfg, num_classes=num_classes + 1))
    cfg.pop('out_channels', None)
    with torch.random.fork_rng(devices=[]):  # does not change the run's random numbers
        larger = MODELS.build(cfg).state_dict()
    found, others = {}, []
    for key, tensor in head.state_dict().items():
        shapes = tuple(tensor.shape), tuple(larger[key].shape) if key in larger else None
        if shapes[0] == shapes[1]:
            continue
        first = next((dim for dim, size in enumerate(tensor.shape) if size > 1), 0) if '.' not in key else 0
        if shapes[1] == _larger(shapes[0], first) and shapes[0][first] == num_classes:
            found[key] = first
        else:
            others.append(f'{key} {shapes[0]}')
    return found, others


def _larger(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return tuple(size + (index == dim) for index, size in enumerate(shape))
