# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the parts of a run need alike, e.g. the list of its images, made once and shared."""

from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar('Value')

_open: list[list[tuple[Any, Any]]] = []


class Sharing:
    """While it is entered, :func:`once` makes every value once; entered again, it has them still.

    Ranks of a distributed run share alike, since all of them ask for the same values in the same
    order: what one of them does not make, none makes.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any]] = []

    def __enter__(self) -> 'Sharing':
        _open.append(self._made)
        return self

    def __exit__(self, *_: object) -> None:
        _open.pop()

    def forget(self) -> None:
        """Lets go of all values."""
        self._made.clear()


def once(key: Any, make: Callable[[], Value]) -> Value:
    """What ``make()`` gives, or gave for an equal key; without a :class:`Sharing`, always anew.

    Args:
        key: what the value depends on, compared by ``==``; kept as long as the value.
        make: makes the value, which nobody may change.
    """
    if not _open:
        return make()
    for known, value in _open[-1]:
        if known == key:
            return value
    value = make()
    _open[-1].append((key, value))
    return value
