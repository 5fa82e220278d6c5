# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which classes are learned when: protocols such as ``15-1`` and their stages. Pure Python."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index as as_int
from typing import SupportsIndex

JOINT = 'joint'
SETTINGS = ('overlapped', 'disjoint', 'sequential', 'partitioned')
"""Which images a stage has, and which of their labels it sees."""
UNKNOWN_LABEL = 254
"""Training label of pixels of the unknown class, which is no output channel; 255 is ignore."""


@dataclass(frozen=True)
class Stage:
    """One stage of a protocol; every tuple holds foreground class ids as in the annotation files.

    Attributes:
        index: Number of the stage; 0 is the initial one.
        new: Classes learned at this stage, in learning order.
        old: Classes learned at earlier stages, in learning order.
        future: Classes of later stages, in learning order.
    """

    index: int
    new: tuple[int, ...]
    old: tuple[int, ...]
    future: tuple[int, ...]

    @property
    def seen(self) -> tuple[int, ...]:
        """Old and new classes in learning order: ``seen[i]`` is the class of channel ``i + 1``."""
        return self.old + self.new

    @property
    def num_channels(self) -> int:
        """Labels known after this stage, background included: the size of the head."""
        return 1 + len(self.seen)

    @property
    def num_old(self) -> int:
        """Labels known before this stage, background included (1 at stage 0)."""
        return 1 + len(self.old)


class Protocol:
    """A list of stages, named the way the field does it.

    ``'m-n'`` learns m foreground classes at stage 0 and n more at each later stage, fewer at the
    last where a remainder is left. ``'joint'`` is one stage with everything.

    Args:
        name: ``'m-n'``, for example ``'15-1'``, or ``'joint'``.
        num_classes: Number of foreground classes of the data set (VOC: 20, ADE20K: 150).
        class_order: Permutation of 1..num_classes: the order in which the classes are learned.
            Defaults to ascending ids.
        split: Only with ``'joint'``: the ``'m-n'`` protocol whose base classes it is reported
            with. Without it all classes count as base classes.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the name is malformed or does not fit ``num_classes``, if ``class_order``
            is not a permutation, or if ``split`` is given beside an ``'m-n'`` name.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 20,
        class_order: Sequence[int] | None = None,
        split: str | None = None,
    ) -> None:
        self.name = name
        self.num_classes = _check_num_classes(num_classes)
        self.class_order = _check_class_order(class_order, self.num_classes)
        self.split = split
        if split is not None and name != JOINT:
            raise ValueError(
                f"split={split!r} belongs to protocol 'joint' alone; protocol {name!r} has its own"
            )
        base = self.num_classes
        if name == JOINT:
            sizes = [self.num_classes]
            if split is not None:
                base = stage_sizes(split, self.num_classes)[0]
        else:
            sizes = stage_sizes(name, self.num_classes)
            base = sizes[0]
        self.stages: tuple[Stage, ...] = _cut(self.class_order, sizes)
        self.base: tuple[int, ...] = self.class_order[:base]

    @property
    def num_base(self) -> int:
        """Number of base classes as the tables count them, background included."""
        return 1 + len(self.base)

    def stage(self, index: int) -> Stage:
        """The stage with this index; unlike ``stages[index]`` it names what exists.

        Raises:
            ValueError: If there is no such stage.
        """
        index = _as_count('stage', index)
        if not 0 <= index < len(self.stages):
            raise ValueError(
                f'stage={index}: protocol {self.name!r} with {self.num_classes} classes has '
                f'the stages 0 to {len(self.stages) - 1}'
            )
        return self.stages[index]

    def channels(self, stage: Stage | int) -> dict[int, int]:
        """Class id to output channel for the classes seen at ``stage``; channel 0 is background."""
        stage = stage if isinstance(stage, Stage) else self.stage(stage)
        return {class_id: channel for channel, class_id in enumerate(stage.seen, start=1)}

    def __repr__(self) -> str:
        sizes = ','.join(str(len(stage.new)) for stage in self.stages)
        split = '' if self.split is None else f', split={self.split!r}'
        return f'Protocol({self.name!r}, num_classes={self.num_classes}{split}; stages of {sizes})'


def stage_sizes(name: str, num_classes: int) -> list[int]:
    """Number of new classes at each stage of the protocol ``'m-n'``.

    Raises:
        TypeError: If ``name`` is no string.
        ValueError: If ``name`` is malformed or does not fit ``num_classes``.
    """
    if not isinstance(name, str):
        raise TypeError(f"a protocol is named by a string such as '15-1', got {name!r}")
    match = re.fullmatch(r'([0-9]+)-([0-9]+)', name)
    if match is None:
        raise ValueError(
            f"protocol {name!r} is not of the form 'm-n' (for example '15-1', '10-1', '100-50') "
            "and not 'joint'"
        )
    first, later = int(match[1]), int(match[2])
    if first < 1 or later < 1:
        raise ValueError(
            f"protocol {name!r}: both numbers of 'm-n' must be at least 1 (for example '15-1')"
        )
    if first > num_classes:
        raise ValueError(
            f'protocol {name!r} starts with {first} classes, but there are only {num_classes} '
            f"foreground classes (for example '{max(1, num_classes - 1)}-1' would fit)"
        )
    rest = num_classes - first
    sizes = [first] + [later] * (rest // later)
    return sizes + [rest % later] if rest % later else sizes


def _cut(class_order: tuple[int, ...], sizes: Sequence[int]) -> tuple[Stage, ...]:
    stages, start = [], 0
    for index, size in enumerate(sizes):
        end = start + size
        stages.append(
            Stage(index, new=class_order[start:end], old=class_order[:start],
                  future=class_order[end:])
        )
        start = end
    return tuple(stages)


def _as_count(name: str, value: SupportsIndex) -> int:
    """The int that a number is, NumPy's too; a bool is none."""
    if isinstance(value, bool) or not hasattr(value, '__index__'):
        raise TypeError(f'{name} must be an int, got {value!r} ({type(value).__name__})')
    return as_int(value)


def _check_num_classes(num_classes: int) -> int:
    num_classes = _as_count('num_classes', num_classes)
    if num_classes < 1:
        raise ValueError(f'num_classes must be at least 1 foreground class, got {num_classes}')
    return num_classes


def _check_class_order(class_order: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    if class_order is None:
        return tuple(range(1, num_classes + 1))
    expected = f'expected a permutation of 1..{num_classes}, for example [2, 1, 3, ...]'
    try:
        order = tuple(as_int(class_id) for class_id in class_order)
    except TypeError:
        raise TypeError(f'class_order={class_order!r}: {expected}') from None
    if 0 in order:
        raise ValueError(
            f'class_order names 0, which is background and is never learned; {expected}'
        )
    outside = sorted(c for c in set(order) if not 1 <= c <= num_classes)
    if outside:
        raise ValueError(f'class_order names classes that do not exist: {outside}; {expected}')
    repeats = sorted(c for c in set(order) if order.count(c) > 1)
    if repeats:
        raise ValueError(f'class_order repeats {repeats}; {expected}')
    if len(order) != num_classes:
        missing = sorted(set(range(1, num_classes + 1)) - set(order))
        raise ValueError(
            f'class_order has {len(order)} of {num_classes} classes, {missing} are missing; '
            f'{expected}'
        )
    return order
