# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Values that several parts of a run need, e.g. the list of its images: computed once and shared."""

from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar('Value')

_open: list[list[tuple[Any, Any]]] = []


class Sharing:
    """A context in which :func:`once` computes every value only once; the values are kept when it is entered again.

    All ranks of a distributed run ask for the same values in the same order. So a value that is
    already known on one rank is known on all of them, and they stay in step.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any]] = []

    def __enter__(self) -> 'Sharing':
        _open.append(self._made)
        return self

    def __exit__(self, *_: object) -> None:
        _open.pop()

    def forget(self) -> None:
        """Drops all values."""
        self._made.clear()


def once(key: Any, make: Callable[[], Value]) -> Value:
    """The result of ``make()``, or its earlier result for an equal key.

    Outside of a :class:`Sharing`, ``make()`` is called every time.

    Args:
        key: everything that the value depends on, compared by ``==`` and kept as long as the value.
        make: computes the value. Callers must not modify it, since it is shared.
    """
    if not _open:
        return make()
    for known, value in _open[-1]:
        if known == key:
            return value
    value = make()
    _open[-1].append((key, value))
    return value
