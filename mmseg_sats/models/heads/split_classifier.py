# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A classifier of separate parts, each of which can be frozen, trained, or constant."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN, AUXILIARY, FUTURE = 'unknown', 'auxiliary', 'future'
"""The spare rows that a classifier may have beside those of its channels, from which new classes can start."""


class SplitClassifier(nn.Module):
    """``conv_seg`` in parts: background, old classes, new classes, and spare rows.

    Each part is a 1x1 convolution with its own parameters. So a part can be frozen, in which case
    momentum and weight decay do not change it either, or have its own learning rate. This is not
    possible for rows of a single tensor.

    The ``state_dict`` is that of mmseg's ``conv_seg``, one ``weight`` and ``bias`` with a row per
    channel, plus ``weight`` and ``bias`` of the spare rows under their name. So a snapshot can be loaded into
    mmseg's own heads, and into a classifier with other parts. (An EMA with ``update_buffers=True`` averages the
    tensors of ``state_dict``, which are copies here: keep mmengine's default, False.)

    With ``background_logit``, background's row is constant: its weight is 0 and its bias is this number. It is no
    parameter, so nothing trains it. A classifier with another background row, such as one that was trained
    by a softmax, is loaded relative to that row: the row's difference to the constant one is added to all rows,
    so that the order of the logits, and with it every prediction, stays the same.

    Args:
        in_channels: channels of the features.
        num_channels: K, background included, without the spare rows.
        num_old: channels of the old model, background included; 1 in stage 0.
        spare: ``'unknown'`` for a class that is the last channel of the output (SSUL), ``'future'`` for rows of
            classes of later stages that are its last channels (DFT*), ``'auxiliary'`` for a row that is no channel of
            the output (DKD), or None.
        spare_rows: how many spare rows there are.
        background_logit: background's constant logit, or None for a background that is trained.

    Attributes:
        beside: the name of the rows whose logits follow those of the K channels, or None.
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        num_old: int,
        spare: str | None = None,
        spare_rows: int = 1,
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
        self.beside = None if spare == AUXILIARY else spare
        if spare is not None:
            self.add_module(spare, nn.Conv2d(in_channels, spare_rows, 1))
        self._register_state_dict_hook(_join_parts)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weight (K, in_channels, 1, 1) and bias (K,) of all channels, background first."""
        pieces = [self.get_submodule(name) for name in self.sizes]
        weight, bias = (torch.cat([getattr(piece, kind) for piece in pieces]) for kind in ('weight', 'bias'))
        return self._with_constant('weight', weight), self._with_constant('bias', bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) of features (B, in_channels, h, w), and behind them those of the rows ``beside``."""
        weight, bias = self.rows()
        if self.beside is not None:
            rows = self.get_submodule(self.beside)
            weight, bias = torch.cat([weight, rows.weight]), torch.cat([bias, rows.bias])
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
