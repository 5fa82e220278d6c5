# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Selects blocks of the encoder by their index among the features or attention maps of a segmentor's output."""

from collections.abc import Sequence
from typing import TypeVar

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
