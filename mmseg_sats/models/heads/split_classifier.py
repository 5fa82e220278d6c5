# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A classifier of separate parts, each of which can be frozen, trained, or constant."""

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN, AUXILIARY = 'unknown', 'auxiliary'
"""The spare rows that a classifier may have beside those of its channels, from which new classes can start."""


class SplitClassifier(nn.Module):
    """``conv_seg`` in parts: background, old classes, new classes, and a spare row.

    Each part is a 1x1 convolution with its own parameters. So a part can be frozen, in which case
    momentum and weight decay do not change it either, or have its own learning rate. This is not
    possible for rows of a single tensor.

    The ``state_dict`` is that of mmseg's ``conv_seg``, one ``weight`` and ``bias`` with a row per
    channel, plus ``weight`` and ``bias`` of the spare row under its name. So a snapshot can be loaded into mmseg's own
    heads, and into a classifier with other parts. (An EMA with ``update_buffers=True`` averages the
    tensors of ``state_dict``, which are copies here: keep mmengine's default, False.)

    With ``background_logit``, background's row is constant: its weight is 0 and its bias is this number. It is no
    parameter, so nothing trains it. A classifier with another background row, such as one that was trained
    by a softmax, is loaded relative to that row: the row's difference to the constant one is added to all rows,
    so that the order of the logits, and with it every prediction, stays the same.

    Args:
        in_channels: channels of the features.
        num_channels: K, background included, without the spare row.
        num_old: channels of the old model, background included; 1 in stage 0.
        spare: ``'unknown'`` for a class that is the last channel of the output (SSUL), ``'auxiliary'`` for a row that
            is no channel of the output (DKD), or None.
        background_logit: background's constant logit, or None for a background that is trained.
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        num_old: int,
        spare: str | None = None,
        background_logit: float | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = num_channels
        self.background_logit = background_logit
        sizes = dict(background=background_logit is None, old=num_old - 1, new=num_channels - num_old)
        self.sizes = {name: int(size) for name, size in sizes.items() if size}
        for name, size in self.sizes.items():
            self.add_module(name, nn.Conv2d(in_channels, size, 1))
        if spare is not None:
            self.add_module(spare, nn.Conv2d(in_channels, 1, 1))
        self._register_state_dict_hook(_join_parts)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weight (K, in_channels, 1, 1) and bias (K,) of all channels, background first."""
        pieces = [self.get_submodule(name) for name in self.sizes]
        weight, bias = (torch.cat([getattr(piece, kind) for piece in pieces]) for kind in ('weight', 'bias'))
        return self._with_constant('weight', weight), self._with_constant('bias', bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) of features (B, in_channels, h, w); an unknown class is one more channel, the last."""
        weight, bias = self.rows()
        unknown = getattr(self, UNKNOWN, None)
        if unknown is not None:
            weight, bias = torch.cat([weight, unknown.weight]), torch.cat([bias, unknown.bias])
        return nn.functional.conv2d(x, weight, bias)

    def _with_constant(self, kind: str, rows: Tensor) -> Tensor:
        """The rows of ``weight`` or ``bias`` with background's in front, if that is constant."""
        if self.background_logit is None:
            return rows
        return torch.cat([self._constant(kind, rows[:1]), rows])

    def _constant(self, kind: str, like: Tensor) -> Tensor:
        return torch.full_like(like, self.background_logit if kind == 'bias' else 0.0)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        # The parts are loaded after this call, by their own names.
        for kind in ('weight', 'bias'):
            rows = state_dict.get(f'{prefix}{kind}')
            if rows is not None and rows.shape[0] == self.out_channels:
                del state_dict[f'{prefix}{kind}']
                if self.background_logit is not None:
                    # Exactly 0 is added where the row is this constant already.
                    rows = rows[1:] + (self._constant(kind, rows[:1]) - rows[:1])
                cut = rows.split(list(self.sizes.values()))
                names = [f'{prefix}{name}.{kind}' for name in self.sizes]
                state_dict.update(zip(names, cut, strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _join_parts(
    module: SplitClassifier, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
) -> None:
    for kind in ('weight', 'bias'):
        rows = torch.cat([state_dict.pop(f'{prefix}{name}.{kind}') for name in module.sizes])
        state_dict[f'{prefix}{kind}'] = module._with_constant(kind, rows)


def split_classifier(
    head: nn.Module, num_old: int, spare: str | None = None, background_logit: float | None = None
) -> None:
    """Replaces the ``conv_seg`` of an mmseg head by a :class:`SplitClassifier`.

    Args:
        head: a head on ``BaseDecodeHead``. With an unknown class its output has one more channel.
        num_old: channels of the old model, background included; 1 in stage 0.
        spare: as in :class:`SplitClassifier`.
        background_logit: as in :class:`SplitClassifier`.
    """
    conv_seg = head.conv_seg
    head.conv_seg = SplitClassifier(
        conv_seg.in_channels, conv_seg.out_channels, num_old, spare=spare, background_logit=background_logit
    )


def check_one_classifier(option: str, name: str, head: nn.Module, tensors: Iterable[str]) -> None:
    """Raises TypeError if more than ``conv_seg`` depends on a head's classes, so that it cannot be split.

    Args:
        option: what needs it, for the message.
        name: the head's name in the segmentor, for the message.
        head: a decode or auxiliary head.
        tensors: the names of those with a row for each class.
    """
    others = [key for key in tensors if not key.startswith('conv_seg.')]
    if others or not isinstance(getattr(head, 'conv_seg', None), nn.Conv2d):
        raise TypeError(
            f'{option}: {name} ({type(head).__name__}) cannot have it: expected a head in which the '
            f'classifier conv_seg alone has a row for each class, found {", ".join(others)}'
        )


def is_auxiliary(key: str) -> bool:
    """Whether a tensor of a segmentor's ``state_dict`` is of an auxiliary row, which no prediction reads."""
    return f'.conv_seg.{AUXILIARY}.' in key
