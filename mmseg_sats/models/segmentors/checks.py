# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that the parts of a segmentor fit together, made when it is built."""

from collections.abc import Iterable, Mapping
from typing import Any

from mmseg.models import EncoderDecoder
from torch import nn

from mmseg_sats.models.heads.classifier import FROM_BACKGROUND
from mmseg_sats.models.heads.classifier_form import ClassifierForm
from mmseg_sats.models.heads.linear_classifier import has_linear_classifier
from mmseg_sats.models.heads.new_rows import NewRows
from mmseg_sats.models.heads.split_classifier import AUXILIARY, FUTURE, UNKNOWN
from mmseg_sats.models.parts import DistillationPart, flag
from mmseg_sats.protocol import UNKNOWN_LABEL
from mmseg_sats.utils.spelling import near_match, one_slip


def check_left_out(distillation: Mapping[str, Any]) -> None:
    """Checks the names of parts that are removed by None: a name close to that of another part is a misspelling."""
    present = [name for name, cfg in distillation.items() if cfg is not None]
    for name, cfg in distillation.items():
        if cfg is None and any(one_slip(name, other) for other in present):
            raise ValueError(
                f'distillation.{name}=None leaves nothing out{near_match(name, present)}; expected one of {present}'
            )


def check_parts(
    model: EncoderDecoder,
    form: ClassifierForm,
    old_model: Mapping[str, Any] | None,
    prototypes: Mapping[str, Any] | None,
) -> None:
    """Raises ValueError if a part asks for what the segmentor does not have.

    Args:
        model: the segmentor, with its ``distillation``.
        form: of its heads' classifiers.
        old_model: the config of the old model; None in stage 0.
        prototypes: the config of the classes' prototypes, or None.
    """
    gives_attention = hasattr(model.backbone, 'forward_with_attention')
    if (wanting := _wanting(model.distillation, 'attention')) and not gives_attention:
        raise ValueError(
            f'distillation {wanting} asks for self-attention, which backbone {type(model.backbone).__name__} does not '
            'give: expected a backbone with forward_with_attention (e.g. AttentionMixVisionTransformer), '
            "or source='feature' in CRPDistillationLoss"
        )
    if (wanting := _wanting(model.distillation, 'prototypes')) and prototypes is None:
        raise ValueError(
            f'distillation {wanting}: asks for prototypes, which the model does not gather; expected '
            "prototypes=dict(type='ClassPrototypes')"
        )
    if (wanting := _wanting(model.distillation, 'all_teachers')) and old_model and 'earlier' not in old_model:
        raise ValueError(
            f'distillation {wanting} needs the models of all stages; expected old_model.earlier, a list of '
            'dict(checkpoint=..., num_old=...) for the stages before the old model'
        )
    if (wanting := _wanting(model.distillation, 'classifier')) and not has_linear_classifier(model.decode_head):
        raise ValueError(
            f'distillation {wanting} reads the features before the classifier: expected a decode head that ends in '
            f'the convolution conv_seg, got {type(model.decode_head).__name__}'
        )
    if (wanting := _wanting(model.distillation, 'residuals')) and old_model and not form.background_residuals:
        raise ValueError(
            f'distillation {wanting} asks for residuals of background; '
            "expected background_residuals='$stage' in the model"
        )
    if form.unknown and UNKNOWN_LABEL in (*range(model.num_classes), model.decode_head.ignore_index):
        raise ValueError(
            f'unknown=True: label {UNKNOWN_LABEL} stands for the unknown class, expected at most '
            f'{UNKNOWN_LABEL} channels and another ignore_index, got {model.num_classes} channels '
            f'and ignore_index={model.decode_head.ignore_index}'
        )


def check_start(start: NewRows, form: ClassifierForm, parts: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if new classes would start from rows that are not there, or that nothing trains.

    Args:
        start: how new rows start.
        form: of the heads' classifiers.
        parts: name to distillation.
    """
    given = f'classifier_init={start.name!r}'
    if start.name == UNKNOWN and not form.unknown:
        raise ValueError(f'{given} starts new classes from the unknown class: expected unknown=True too')
    if form.unknown and start.measured is not None:
        raise ValueError(f"unknown=True and {given} do not go together: expected classifier_init='unknown'")
    for name in ('background_residuals', 'closed_form'):
        if getattr(form, name) and start.measured is not None:
            # The old model's logits are not those of its rows.
            raise ValueError(f"{name}={getattr(form, name)!r} and {given} do not go together: expected 'random'")
    if form.future_classes and start.name != FUTURE:
        raise ValueError(
            f'future_classes={form.future_classes} are rows that wait for the classes of later stages, but {given} '
            "starts these from others: expected 'future'"
        )
    trains = _wanting(parts, 'auxiliary')
    if form.auxiliary and not trains:
        raise ValueError(
            f'{given} starts new classes from an auxiliary classifier, which no part trains: expected an '
            'AuxiliaryClassifierLoss in distillation'
        )
    if trains and not form.auxiliary:
        raise ValueError(
            f'distillation {trains} trains an auxiliary classifier, from which new classes start with '
            f'classifier_init={AUXILIARY!r}, got {start.name!r}'
        )
    from_background = start.name in FROM_BACKGROUND or start.measured is not None
    if form.background_logit is not None and from_background:
        raise ValueError(
            f'background_logit={form.background_logit!r}: background has no row that new classes could start from by '
            f"{given}; expected 'random' or 'auxiliary'"
        )


def check_losses(form: ClassifierForm, heads: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError if a background of constant logit does not fit the losses.

    Args:
        form: of the heads' classifiers.
        heads: names and heads, with their losses.
    """
    constant = form.background_logit
    for name, head in heads:
        losses = head.loss_decode
        for loss in losses if isinstance(losses, nn.ModuleList) else [losses]:
            left_out = getattr(loss, 'leaves_out_background', False)
            if constant is not None and not left_out:
                raise ValueError(
                    f'background_logit={constant!r}: {type(loss).__name__} of {name} trains background too; expected a '
                    'loss whose leaves_out_background is True, e.g. SigmoidCrossEntropyLoss with background=False'
                )
            if left_out and constant is None:
                raise ValueError(
                    f'{type(loss).__name__} of {name} leaves background out, which then is trained by nothing; '
                    'expected background_logit=0.0 in the model'
                )


def _wanting(parts: Mapping[str, nn.Module], what: str) -> str:
    """The names of the parts with a flag ``needs_...``."""
    return ', '.join(name for name, part in parts.items() if flag(part, f'needs_{what}', DistillationPart))
