# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the options of a segmentor make of its heads' classifiers ``conv_seg``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from mmseg_sats.models.heads.closed_form import EXPANSION, ROWS, ClosedFormClassifier
from mmseg_sats.models.heads.residual_classifier import ResidualClassifier
from mmseg_sats.models.heads.split_classifier import AUXILIARY, FUTURE, UNKNOWN, SplitClassifier

_OF_ONE_METHOD = tuple(f'.conv_seg.{name}' for name in (AUXILIARY, FUTURE, ROWS, EXPANSION))
# The options of which one alone can be given, for each makes another classifier.
_ALTERNATIVES = ('unknown', 'future_classes', 'auxiliary', 'background_residuals', 'closed_form')


def is_of_one_method(key: str) -> bool:
    """Whether a tensor is one that only some methods' classifiers have.

    A model of such a method takes stage 0 from a checkpoint that lacks it, and another model does not need it.
    """
    return any(part in key for part in _OF_ONE_METHOD)


@dataclass(frozen=True)
class ClassifierForm:
    """The classifiers of a segmentor's heads.

    Args:
        unknown: a row for the unknown class (SSUL), whose logit is one more channel of the output.
        future_classes: so many rows for the classes of later stages (DFT*), likewise.
        auxiliary: an auxiliary row of the decode head, which is no channel of the output (DKD).
        background_residuals: so many residuals by which later stages lower the decode head's background (BARM).
        closed_form: ``width`` and ``seed`` of the decode head's :class:`ClosedFormClassifier` (C-RLS).
        background_logit: a constant logit for background (DKD, STAR), or None.
        split_classifier: whether the rows are in parts that can be frozen, as with all of these but ``closed_form``.

    Raises:
        ValueError: an option is out of its range, or options do not go together.
    """

    unknown: bool = False
    future_classes: int = 0
    auxiliary: bool = False
    background_residuals: int = 0
    closed_form: Mapping[str, Any] | None = None
    background_logit: float | None = None
    split_classifier: bool = False

    def __post_init__(self) -> None:
        self._check_number('future_classes', 'how many there are, a number from 0 on')
        self._check_number('background_residuals', "'$stage', the index of the stage, or 0")
        constant = self.background_logit
        if constant is not None and not (isinstance(constant, int | float) and math.isfinite(constant)):
            raise ValueError(
                f'background_logit={constant!r}: expected a finite number, 0.0 for a threshold of 0.5 on the sigmoids, '
                'or None'
            )
        given = self._given()
        excluded = [name for name in _ALTERNATIVES if name in given]
        # These have a background of their own.
        without_constant = {'unknown', 'background_residuals', 'closed_form'} & given.keys()
        if without_constant and constant is not None:
            excluded.append('background_logit')
        if self.closed_form and self.split_classifier:
            excluded.append('split_classifier')
        if len(excluded) > 1:
            raise ValueError(
                f'{" and ".join(given[name] for name in excluded)} do not go together, for each makes another '
                'classifier: expected one of them'
            )

    def _check_number(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f'{name}={value!r}: expected {expected}')

    def _given(self) -> dict[str, str]:
        """The options that are not at their default, by name, as they are written."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        return {
            name: "classifier_init='auxiliary'" if name == 'auxiliary' else f'{name}={value!r}'
            for name, value in given.items()
        }

    def of_stage(self, index: int) -> 'ClassifierForm':
        """The form that a model of the same method had in an earlier stage, without what its logits do not need."""
        residuals = min(self.background_residuals, index)
        return ClassifierForm(self.unknown, background_residuals=residuals, closed_form=self.closed_form)

    def of_head(self, name: str) -> 'ClassifierForm':
        """The form of a head's classifier; what only the decode head has is left out for another one."""
        if name == 'decode_head':
            return self
        return replace(self, auxiliary=False, background_residuals=0, closed_form=None)

    def shape(self, name: str, head: nn.Module, tensors: Iterable[str], num_old: int) -> dict[str, int]:
        """Replaces the ``conv_seg`` of a head, if an option asks for that.

        Args:
            name: the head's name in the segmentor.
            head: a head on ``BaseDecodeHead``. Its output then has more channels if there is an unknown class, or rows
                for classes of later stages.
            tensors: the names of its tensors with a row for each class.
            num_old: channels of the old model, background included; 1 in stage 0.

        Returns:
            Further tensors with a row for each class, to the dimension of the classes.

        Raises:
            TypeError: more than ``conv_seg`` depends on the head's classes.
        """
        own = self.of_head(name)
        given = own._given()
        if not given:
            return {}
        others = [key for key in tensors if not key.startswith('conv_seg.')]
        conv_seg = getattr(head, 'conv_seg', None)
        if others or not isinstance(conv_seg, nn.Conv2d):
            raise TypeError(
                f'{next(iter(given.values()))}: {name} ({type(head).__name__}) cannot have another classifier: '
                'expected a head in which the classifier conv_seg alone has a row for each class, found '
                + ', '.join(others)
            )
        sizes = conv_seg.in_channels, conv_seg.out_channels
        if own.closed_form:
            with torch.random.fork_rng(devices=[]):  # the run's random numbers are those of a run without it
                head.conv_seg = ClosedFormClassifier(*sizes, **own.closed_form)
            head.conv_seg.weight, head.conv_seg.bias = conv_seg.weight, conv_seg.bias
            return {f'conv_seg.{ROWS}': 0}
        if own.background_residuals:
            head.conv_seg = ResidualClassifier(*sizes, num_old, own.background_residuals)
        else:
            spare = {UNKNOWN: int(own.unknown), FUTURE: own.future_classes, AUXILIARY: int(own.auxiliary)}
            name, rows = next(((name, rows) for name, rows in spare.items() if rows), (None, 0))
            head.conv_seg = SplitClassifier(*sizes, num_old, name, rows, own.background_logit)
        return {}
