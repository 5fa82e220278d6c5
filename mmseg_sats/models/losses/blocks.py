# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Selects blocks of the encoder by their index among the features or attention maps of a segmentor's output."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar('T')


def block_indices(blocks: Sequence[int]) -> tuple[int, ...]:
    """Returns ``blocks`` as a tuple.

    Raises:
        ValueError: there are none, or an index is negative or repeated.
    """
    indices = tuple(blocks)
    if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        raise ValueError(f'blocks must be different indices from 0 on, got {blocks}')
    return indices


def pick_blocks(available: Sequence[T], blocks: tuple[int, ...], owner: str) -> list[T]:
    """Returns ``available[i]`` for each i in ``blocks``.

    Raises:
        ValueError: an index is out of range. ``owner`` is used in the message.
    """
    if max(blocks) >= len(available):
        raise ValueError(
            f'blocks {blocks}: the {owner} has only {len(available)} blocks,'
            f' 0 to {len(available) - 1}'
        )
    return [available[index] for index in blocks]


def check_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises ValueError unless both have the same number, at least one, of (B, C_j, h_j, w_j) of the same shapes."""
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            'student and teacher must have the same number of features, at least one,'
            f' got {len(student)} and {len(teacher)}'
        )
    for index, (new, old) in enumerate(zip(student, teacher, strict=True)):
        if new.dim() != 4 or new.shape != old.shape:
            raise ValueError(
                f'features {index}: student and teacher must both be (B, C, h, w),'
                f' got {tuple(new.shape)} and {tuple(old.shape)}'
            )
