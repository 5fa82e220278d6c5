# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that the parts of a segmentor fit its heads' classifiers, made when it is built."""

import math
from collections.abc import Iterable, Mapping

from torch import nn

from mmseg_sats.models.heads.classifier import FROM_BACKGROUND
from mmseg_sats.models.heads.linear_classifier import has_linear_classifier
from mmseg_sats.models.heads.split_classifier import AUXILIARY, UNKNOWN
from mmseg_sats.models.parts import DistillationPart, flag


def check_spare(classifier_init: str, unknown: bool, parts: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if new classes would start from a row that is not there, or that nothing trains.

    Args:
        classifier_init: how new classifier rows are initialised.
        unknown: whether the model has an unknown class.
        parts: name to distillation.
    """
    if classifier_init == UNKNOWN and not unknown:
        raise ValueError(
            "classifier_init='unknown' starts new classes from the unknown class: expected unknown=True too"
        )
    if classifier_init == AUXILIARY and unknown:
        raise ValueError("classifier_init='auxiliary': expected 'unknown' or another one in a model with unknown=True")
    trains = [name for name, part in parts.items() if flag(part, 'needs_auxiliary', DistillationPart)]
    if classifier_init == AUXILIARY and not trains:
        raise ValueError(
            "classifier_init='auxiliary' starts new classes from an auxiliary classifier, which no part trains: "
            "expected an AuxiliaryClassifierLoss in distillation"
        )
    if trains and classifier_init != AUXILIARY:
        raise ValueError(
            f"distillation {', '.join(trains)} trains an auxiliary classifier, from which new classes start with "
            f"classifier_init='auxiliary', got {classifier_init!r}"
        )


def check_background(
    background_logit: float | None, classifier_init: str, unknown: bool, heads: Iterable[tuple[str, nn.Module]]
) -> None:
    """Raises ValueError if a background of constant logit does not fit the losses, or the start of new classes.

    Args:
        background_logit: the constant, or None for a background that is trained.
        classifier_init: how new classifier rows are initialised.
        unknown: whether the model has an unknown class.
        heads: names and heads, with their losses.
    """
    constant = background_logit is not None
    given = f'background_logit={background_logit!r}'
    if constant and not (isinstance(background_logit, int | float) and math.isfinite(background_logit)):
        raise ValueError(f'{given}: expected a finite number, 0.0 for a threshold of 0.5 on the sigmoids, or None')
    if constant and unknown:
        raise ValueError(f"{given}: expected None with unknown=True, where the unknown class's score is added to it")
    if constant and classifier_init in FROM_BACKGROUND:
        raise ValueError(
            f'{given}: background has no row that new classes could start from by '
            f"classifier_init={classifier_init!r}; expected 'random' or 'auxiliary'"
        )
    for name, head in heads:
        losses = head.loss_decode
        for loss in losses if isinstance(losses, nn.ModuleList) else [losses]:
            left_out = getattr(loss, 'leaves_out_background', False)
            if constant and not left_out:
                raise ValueError(
                    f'{given}: {type(loss).__name__} of {name} trains background too; expected a loss whose '
                    'leaves_out_background is True, e.g. SigmoidCrossEntropyLoss with background=False'
                )
            if left_out and not constant:
                raise ValueError(
                    f'{type(loss).__name__} of {name} leaves background out, which then is trained by nothing; '
                    'expected background_logit=0.0 in the model'
                )


def check_residuals(
    residuals: int, unknown: bool, background_logit: float | None, num_old: int, parts: Mapping[str, nn.Module]
) -> None:
    """Raises ValueError if residuals of background do not fit the other options, or a part lacks them.

    Args:
        residuals: their number.
        unknown: whether the model has an unknown class.
        background_logit: background's constant logit, or None.
        num_old: channels of the old model; 1 in stage 0, which has no residual.
        parts: name to distillation, which may need residuals.
    """
    if not isinstance(residuals, int) or residuals < 0:
        raise ValueError(f"background_residuals={residuals!r}: expected '$stage', the index of the stage, or 0")
    if residuals and (unknown or background_logit is not None):
        raise ValueError(
            f'background_residuals={residuals}: expected 0 with unknown=True or with a background_logit'
        )
    wanting = [name for name, part in parts.items() if flag(part, 'needs_residuals', DistillationPart)]
    if wanting and num_old > 1 and not residuals:
        raise ValueError(
            f"distillation {', '.join(wanting)} asks for residuals of background; expected "
            "background_residuals='$stage' in the model"
        )


def check_linear_classifier(head: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if a part reads the decode head's classifier, and the head does not end in ``conv_seg``."""
    wanting = [name for name, part in parts.items() if flag(part, 'needs_classifier', DistillationPart)]
    if wanting and not has_linear_classifier(head):
        raise ValueError(
            f'distillation {", ".join(wanting)} reads the features before the classifier: expected a decode head '
            f'that ends in the convolution conv_seg, got {type(head).__name__}'
        )
