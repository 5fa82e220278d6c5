# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The biases and the rows' norms of a head's classifier."""

from collections.abc import Sequence

from torch import nn

from mmseg_sats.models.heads.closed_form import ClosedFormClassifier
from mmseg_sats.models.heads.linear_classifier import has_linear_classifier
from mmseg_sats.models.heads.split_classifier import SplitClassifier


class NotMeasurableError(ValueError):
    """A part of the diagnosis that a model does not allow; the message says why."""


def check_linear(head: nn.Module) -> None:
    """Raises NotMeasurableError if a head does not end in a linear classifier."""
    if not has_linear_classifier(head):
        raise NotMeasurableError(f'{type(head).__name__} has no linear classifier conv_seg')


def classifier_rows(head: nn.Module, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """The ``bias`` and the Euclidean ``norm`` of the row of each class, by name.

    Args:
        head: the decode head.
        classes: by channel.

    Raises:
        NotMeasurableError: there are no such rows, or the predictions are not made with them.
    """
    check_linear(head)
    layer = head.conv_seg
    if isinstance(layer, ClosedFormClassifier) and layer.fitted:
        raise NotMeasurableError('the classifier predicts with rows in closed form, which have another input')
    weight, bias = layer.rows() if isinstance(layer, SplitClassifier) else (layer.weight, layer.bias)
    norms = weight.detach().flatten(1).double().norm(dim=1).tolist()
    biases = [0.0] * len(norms) if bias is None else bias.detach().double().tolist()
    return dict(bias=dict(zip(classes, biases, strict=True)), norm=dict(zip(classes, norms, strict=True)))
