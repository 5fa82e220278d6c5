# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Classifiers that grow from the old model's channels to those of the current stage.

Most of mmseg's decode heads built on ``BaseDecodeHead`` end in ``conv_seg``, a 1x1 convolution with one
row per channel; some have other tensors with a row for each class beside it. The rows are added to the
checkpoint while it is loaded. So every head is built with its final size, and no other part of the model is
involved.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from mmseg_sats.functional.new_rows import align_norms
from mmseg_sats.models.heads.split_classifier import AUXILIARY, FUTURE, UNKNOWN, SplitClassifier
from mmseg_sats.utils.spelling import check_choice

Rows = tuple[Tensor, Tensor]


def balanced_bias(bias: Tensor, num_new: int) -> Tensor:
    """The bias with which background and N new classes of the same weight share background's probability."""
    return bias - math.log(num_new + 1)


def _balanced(old: Rows, fresh: Rows, spare: Rows | None) -> Rows:
    """MiB's balanced initialisation (Cermelli et al., CVPR 2020, eq. (9) and (10)).

    New classes take over the background's weight, and background and new classes share its
    probability. So at the start, the probabilities of background and new classes add up to the old
    model's probability of background.
    """
    weight, bias = (rows.clone() for rows in old)
    num_new = fresh[0].shape[0] - weight.shape[0]
    bias[0] = balanced_bias(bias[0], num_new)
    new_weight = weight[:1].expand(num_new, *weight.shape[1:])
    return torch.cat([weight, new_weight]), torch.cat([bias, bias[:1].expand(num_new)])


def _keep_background(old: Rows, fresh: Rows, spare: Rows | None) -> Rows:
    """New classes take over the background's weight and bias, and background keeps its own bias (MBS).

    The balanced initialisation lowers the background's bias by ``log(n + 1)`` at every stage, against the old
    classes too. Here the old logits do not change, but the n new classes each start as probable as background.
    """
    num_new = fresh[0].shape[0] - old[0].shape[0]
    return tuple(torch.cat([rows, rows[:1].expand(num_new, *rows.shape[1:])]) for rows in old)


def _random(old: Rows, fresh: Rows, spare: Rows | None) -> Rows:
    """New rows keep the head's own initial values."""
    weight, bias = (rows.clone() for rows in fresh)
    weight[: old[0].shape[0]], bias[: old[1].shape[0]] = old
    return weight, bias


def _from_spare(old: Rows, fresh: Rows, spare: Rows | None) -> Rows:
    """New classes start as copies of the row that was trained for them.

    This is the unknown class, which they were a part of so far (SSUL, section 3.2), or the auxiliary classifier, which
    has learned to reject what every stage so far showed (DKD).
    """
    num_new = fresh[0].shape[0] - old[0].shape[0]
    return tuple(torch.cat([rows, *[row] * num_new]) for rows, row in zip(old, spare, strict=True))


def _from_future(old: Rows, fresh: Rows, spare: Rows | None) -> Rows:
    """New classes take over the rows that have waited for them since stage 0 (DFT*)."""
    num_new = fresh[0].shape[0] - old[0].shape[0]
    if len(spare[0]) < num_new:
        raise ValueError(
            f"classifier_init='future' needs a checkpoint with rows for {num_new} future classes, found "
            f'{len(spare[0])}: expected future_classes of the model in every stage'
        )
    return tuple(torch.cat([rows, rest[:num_new]]) for rows, rest in zip(old, spare, strict=True))


CLASSIFIER_INITS: dict[str, Callable[[Rows, Rows, Rows | None], Rows]] = {
    'balanced': _balanced,
    FUTURE: _from_future,
    'keep_background': _keep_background,
    'random': _random,
    UNKNOWN: _from_spare,
    AUXILIARY: _from_spare,
}
# Those whose new rows are background's, also in tensors that are no classifier of pixels.
FROM_BACKGROUND = ('balanced', 'keep_background')


def grow_head(
    state_dict: MutableMapping[str, Tensor],
    prefix: str,
    head: nn.Module,
    tensors: Mapping[str, int],
    num_old: int,
    init: str,
    align: bool = False,
) -> None:
    """Adds rows for the new classes to the tensors of a head in a checkpoint, in place.

    A classifier of pixels, which is a convolution with a bias, grows by ``init``. In other tensors, the new rows are
    copies of the background's with ``'balanced'`` and ``'keep_background'``, else the head's own initial values, as
    always in other tensors of a classifier.
    Rows of old classes never change, except the background's bias in a balanced classifier. Tensors that already
    have the head's size are not changed.

    Args:
        state_dict: the checkpoint's tensors.
        prefix: the head's prefix in ``state_dict``, e.g. ``'decode_head.'``.
        head: the head that the checkpoint is loaded into; it has the final number of rows.
        tensors: those with a row for each class, see :func:`class_tensors`.
        num_old: channels of the old model, background included.
        init: ``'balanced'`` (MiB), ``'keep_background'`` (background's row, whose own bias is left),
            ``'random'`` (the head's own initial values), ``'unknown'`` (SSUL) or ``'auxiliary'`` (DKD: the row
            ``{prefix}conv_seg.auxiliary.*`` of the checkpoint), or ``'future'`` (DFT*: the first of the rows
            ``{prefix}conv_seg.future.*``, which are taken out of the checkpoint).
        align: whether the new rows of classifiers are scaled to the norms of the old ones.

    Raises:
        ValueError: ``init`` is unknown, or it needs rows that the checkpoint does not have.
    """
    check_choice('classifier_init', init, CLASSIFIER_INITS)
    fresh = {key: value.detach() for key, value in head.state_dict().items()}
    for key, dim in tensors.items():
        old = state_dict.get(prefix + key)
        if old is None or old.shape[dim : dim + 1] != (num_old,) or fresh[key].shape[dim] == num_old:
            continue
        module, _, kind = key.rpartition('.')
        classifier = _is_classifier(head.get_submodule(module))
        if not classifier or kind not in ('weight', 'bias'):
            own = fresh[key].to(old.device)
            num_new = own.shape[dim] - num_old
            copied = init in FROM_BACKGROUND and not classifier
            new = [old.narrow(dim, 0, 1)] * num_new if copied else [own.narrow(dim, num_old, num_new)]
            state_dict[prefix + key] = torch.cat([old, *new], dim)
        elif kind == 'weight':
            _grow_classifier(state_dict, prefix + module, fresh, module, init, align)
    for key in (key for key in fresh if '.residual.' in key and prefix + key in state_dict):
        # BARM's residual of the new stage.
        old = state_dict[prefix + key]
        state_dict[prefix + key] = torch.cat([old, fresh[key][len(old) :].to(old.device)])


def _is_classifier(part: nn.Module) -> bool:
    """Whether a part of a head with a row for each class classifies pixels, so that its rows are shared as logits."""
    return isinstance(part, SplitClassifier) or (isinstance(part, nn.Conv2d) and part.bias is not None)


def _grow_classifier(
    state_dict: MutableMapping[str, Tensor],
    name: str,
    fresh: Mapping[str, Tensor],
    own_name: str,
    init: str,
    align: bool,
) -> None:
    keys, spare_keys = ([f'{part}.{kind}' for kind in ('weight', 'bias')] for part in (name, f'{name}.{init}'))
    if keys[1] not in state_dict:
        return
    old = tuple(state_dict[key] for key in keys)
    own = tuple(fresh[f'{own_name}.{kind}'].to(old[0].device) for kind in ('weight', 'bias'))
    spare = tuple(state_dict[key] for key in spare_keys if key in state_dict) or None
    if init in (UNKNOWN, AUXILIARY, FUTURE) and spare is None:
        raise ValueError(f'classifier_init={init!r} needs a checkpoint with rows {name}.{init}')
    weight, bias = CLASSIFIER_INITS[init](old, own, spare)
    if align:
        flat, bias = align_norms(weight.flatten(1), bias, old[0].flatten(1), old[1])
        weight = flat.view_as(weight)
    state_dict[keys[0]], state_dict[keys[1]] = weight, bias
    if init == FUTURE:
        for key in spare_keys:
            state_dict[key] = state_dict[key][len(weight) - len(old[0]) :]
            if not len(state_dict[key]):
                del state_dict[key]


def add_background(state_dict: MutableMapping[str, Tensor], prefix: str, tensors: Mapping[str, int]) -> None:
    """Adds a background channel at index 0 to a head that was trained without one, in place.

    The new row is the mean of all class rows. If the logits are those of a classifier of pixels, the softmax over
    the old classes does not change, and since a mean never exceeds the largest value, background is not predicted
    anywhere before training.

    Args:
        state_dict: the checkpoint's tensors.
        prefix: the head's prefix, e.g. ``'decode_head.'``.
        tensors: those with a row for each class, see :func:`class_tensors`.
    """
    for key, dim in tensors.items():
        rows = state_dict.get(prefix + key)
        if rows is not None:
            state_dict[prefix + key] = torch.cat([rows.mean(dim, keepdim=True), rows], dim)


def split_binary(state_dict: MutableMapping[str, Tensor], prefix: str, threshold: float) -> None:
    """Gives a classifier with one channel for two classes a channel for background, in place.

    mmseg predicts the foreground where the sigmoid of the channel exceeds a threshold. The background's logit
    becomes the constant ``log(threshold / (1 - threshold))``, so that the same pixels are predicted as before.

    Args:
        state_dict: the checkpoint's tensors; ``{prefix}conv_seg.weight`` is (1, C, 1, 1).
        prefix: the head's prefix, e.g. ``'decode_head.'``.
        threshold: of the head, between 0 and 1.

    Raises:
        ValueError: the threshold is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f'{prefix}threshold={threshold!r}: expected a number between 0 and 1')
    if f'{prefix}conv_seg.bias' not in state_dict:
        return
    weight, bias = (state_dict[f'{prefix}conv_seg.{kind}'] for kind in ('weight', 'bias'))
    constant = torch.full_like(bias, math.log(threshold / (1 - threshold)))
    state_dict[f'{prefix}conv_seg.weight'] = torch.cat([torch.zeros_like(weight), weight])
    state_dict[f'{prefix}conv_seg.bias'] = torch.cat([constant, bias])


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
