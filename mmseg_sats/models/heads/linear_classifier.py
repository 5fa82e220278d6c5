# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The last layer of a head as a value: the features that it classifies, and its rows."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from mmseg_sats.models.heads.split_classifier import AUXILIARY, SplitClassifier


@dataclass(eq=False)
class LinearClassifier:
    """The classifier of a head: at every position, ``logits = weight @ features + bias``.

    Args:
        features: (B, C, h, w), the classifier's input, after the head's dropout.
        weight: (K, C).
        bias: (K,).
        auxiliary: the auxiliary classifier of one channel, which maps features to (B, 1, h, w), or None.
        residual: maps features to the residuals of background (B, R, h, w), or None. Background is then not the first
            logit, see :class:`ResidualClassifier`.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor
    auxiliary: nn.Module | None = None
    residual: nn.Conv2d | None = None


def has_linear_classifier(head: nn.Module) -> bool:
    """Whether a head ends in ``conv_seg`` as those on ``BaseDecodeHead`` do."""
    return isinstance(getattr(head, 'conv_seg', None), nn.Conv2d | SplitClassifier)


@contextmanager
def seen_classifier(head: nn.Module) -> Iterator[list[LinearClassifier]]:
    """A context in which the list gets a head's :class:`LinearClassifier` at every call of its ``conv_seg``.

    Calls by other threads are left out: copies of a student share their old model.
    """
    seen: list[LinearClassifier] = []
    own = threading.get_ident()

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() != own:
            return
        weight, bias = module.rows() if isinstance(module, SplitClassifier) else (module.weight, module.bias)
        spare = getattr(module, AUXILIARY, None), getattr(module, 'residual', None)
        seen.append(LinearClassifier(inputs[0], weight.flatten(1), bias, *spare))

    handle = head.conv_seg.register_forward_pre_hook(see)
    try:
        yield seen
    finally:
        handle.remove()
