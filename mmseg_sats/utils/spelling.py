# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Messages for names that are misspelt or were changed, and for errors that say nothing. Pure Python."""

import difflib
import traceback
import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar('T')


def near_match(name: object, choices: Collection[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``choices``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1)
    return f' (did you mean {close[0]!r}?)' if close else ''


def check_choice(option: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError if ``value`` is none of ``choices``; the message names ``option`` and the nearest choice."""
    if value not in choices:
        raise ValueError(
            f'{option}={value!r} is unknown{near_match(value, choices)}; expected one of {list(choices)}'
        )


def choose(option: str, name: object, choices: Mapping[str, T]) -> T:
    """Returns ``choices[name]``; raises the error of :func:`check_choice` if there is none."""
    check_choice(option, name, choices)
    return choices[name]


def one_slip(one: str, other: str) -> bool:
    """Whether two names differ by one letter (added, missing or replaced) or by two swapped neighbouring letters."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if start is None:
        return len(one) != len(other)
    rest = one[start:], other[start:]
    return (
        rest[0][1:] == rest[1][1:]
        or rest[0][1:] == rest[1]
        or rest[0] == rest[1][1:]
        or (rest[0][:2] == rest[1][:2][::-1] and rest[0][2:] == rest[1][2:])
    )


def warn_renamed(old: str, new: str) -> None:
    """Warns that ``old``, a name of an earlier version, is now called ``new``."""
    warnings.warn(
        f'{old} is called {new} now; the earlier name works until version 0.2',
        FutureWarning,
        stacklevel=3,
    )


def text_of(error: BaseException) -> str:
    """An error's message; of one that has none, such as a bare ``assert``, the line of code that raised it."""
    told = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return told or (f'({frames[-1].line}, in {frames[-1].name})' if frames else '')
