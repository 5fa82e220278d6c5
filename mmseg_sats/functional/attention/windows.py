# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How a layer cuts a grid into windows, as Swin does: padding, a cyclic shift, and the cut."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.attention.class_regions import Grid

# Swin adds this to the score of two tokens that are in one window only because of the cyclic shift.
APART = -100.0


@dataclass(frozen=True)
class Windows:
    """A grid that is padded at the bottom and right to whole windows, shifted, and cut into windows.

    The tokens of a window are its extra tokens, then its positions row by row. Windows are ordered row by
    row. The tokens of all windows, one window after the other, are the ``count * tokens`` slots.

    Args:
        hw: (h, w) of the grid.
        size: (height, width) of a window.
        shift: by how much the padded grid is rolled up and to the left before it is cut.
        extra_tokens: how many tokens without a position come first in each window; e.g. 1 for the class
            token of a layer with a single window, whose ``size`` is ``hw``.

    Raises:
        ValueError: a number is impossible.
    """

    hw: Grid
    size: Grid
    shift: Grid = (0, 0)
    extra_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ('hw', 'size', 'shift'):  # they are used as keys of a dict, so they cannot be lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        fits = all(0 <= by < side for by, side in zip(self.shift, self.size, strict=True))
        if min(*self.hw, *self.size) < 1 or not fits or self.extra_tokens < 0:
            raise ValueError(
                f'expected a grid and windows of 1 x 1 at least, 0 <= shift < size and no negative '
                f'number of extra tokens, got {self}'
            )

    @property
    def padded_hw(self) -> Grid:
        """(h, w) of the padded grid."""
        height, width = (-(-side // own) * own for side, own in zip(self.hw, self.size, strict=True))
        return height, width

    @property
    def count(self) -> int:
        """The number of windows."""
        return (self.padded_hw[0] // self.size[0]) * (self.padded_hw[1] // self.size[1])

    @property
    def tokens(self) -> int:
        """The number of tokens of a window."""
        return self.extra_tokens + self.size[0] * self.size[1]

    @property
    def extra_keys(self) -> int:
        """The number of slots without a position: padding and extra tokens."""
        return self.count * self.tokens - self.hw[0] * self.hw[1]

    def keys(self, device: torch.device) -> Tensor:
        """(count, tokens) long: the index of each slot among the keys of the map.

        The keys are first the slots without a position, in their order, then the positions of the grid row
        by row.
        """
        return _layout(self, device).keys

    def slots(self, device: torch.device) -> Tensor:
        """(count * tokens,) long: the slot of each key."""
        return _layout(self, device).slots

    def mask(self, device: torch.device) -> Tensor | None:
        """(count, 1, tokens, tokens): what Swin adds to the scores of a shifted grid; None if there is no shift.

        It is -100 for two tokens of a window that come from opposite ends of the padded grid, otherwise 0.
        """
        return _layout(self, device).mask if any(self.shift) else None


class _Layout(NamedTuple):
    keys: Tensor
    slots: Tensor
    mask: Tensor


@lru_cache(maxsize=64)
def _layout(windows: Windows, device: torch.device) -> _Layout:
    with torch.inference_mode(False):
        (height, width), size = windows.padded_hw, windows.size
        cells = torch.arange(height * width)
        cells = cells.view(height // size[0], size[0], width // size[1], size[1]).transpose(1, 2)
        cells = cells.reshape(windows.count, -1)
        shifted = cells // width, cells % width
        row = (shifted[0] + windows.shift[0]) % height
        column = (shifted[1] + windows.shift[1]) % width
        placed = (row < windows.hw[0]) & (column < windows.hw[1])
        extra = (windows.extra_tokens, 0)
        placed = F.pad(placed, extra, value=False)
        place = F.pad(row * windows.hw[1] + column, extra)
        outside = ((~placed).flatten().cumsum(0) - 1).view_as(place)
        keys = torch.where(placed, windows.extra_keys + place, outside)
        part = F.pad(3 * _band(shifted[0], windows, 0) + _band(shifted[1], windows, 1), extra)
        together = part.unsqueeze(1) == part.unsqueeze(2)
        mask = torch.zeros(together.shape).masked_fill_(~together, APART).unsqueeze(1)
        return _Layout(*(own.to(device) for own in (keys, keys.flatten().argsort(), mask)))


def _band(shifted: Tensor, windows: Windows, axis: int) -> Tensor:
    """Which of three bands of the rolled grid a coordinate is in; the last band was rolled in from the other end."""
    side, shift = windows.padded_hw[axis], windows.shift[axis]
    if not shift:
        return torch.zeros_like(shifted)
    return (shifted >= side - windows.size[axis]).long() + (shifted >= side - shift)
