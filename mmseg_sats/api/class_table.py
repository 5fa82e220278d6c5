# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Matches the classes of new masks with those of a trained model by their names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prettytable import PrettyTable

from mmseg_sats.datasets.folder import BLACK, distinct_colours
from mmseg_sats.utils.spelling import near_match, one_slip

BACKGROUND = 'background'
IGNORED = 'ignored'


def numbered(words: str | Sequence[str] | Mapping[str, int], option: str) -> dict[str, int]:
    """Names and their numbers in masks.

    Args:
        words: ``'cat,dog'`` or ``['cat', 'dog']``, numbered from 1 by their places; ``'cat=11,dog=12'`` or a
            mapping give the numbers.
        option: what it is called, for messages.

    Raises:
        ValueError: there is no name, a name or number appears twice, or a number is not in 0..255.
    """
    if isinstance(words, Mapping):
        pairs = [(str(name), number) for name, number in words.items()]
    else:
        listed = words.split(',') if isinstance(words, str) else words
        listed = [str(word).strip() for word in listed if str(word).strip()]
        pairs = [_pair(word, place, option) for place, word in enumerate(listed, start=1)]
    if not pairs:
        raise ValueError(f'{option}: expected names of classes, such as cat,dog or cat=11,dog=12')
    for what, found in (('name', [_plain(name) for name, _ in pairs]), ('number', [number for _, number in pairs])):
        twice = [one for one in found if found.count(one) > 1]
        if twice:
            raise ValueError(f'{option}: the {what} {twice[0]!r} appears twice: expected each once')
    for name, number in pairs:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 255:
            raise ValueError(f'{option}: {name}={number!r}: expected a number in 0..255')
    return dict(pairs)


def _pair(word: str, place: int, option: str) -> tuple[str, int]:
    name, mark, number = word.rpartition('=')
    if not mark:
        return word, place
    if not number.strip().isdigit():
        raise ValueError(f'{option}: {word}: expected NAME=NUMBER, the number of the class in the masks')
    return name.strip(), int(number)


def _plain(name: str) -> str:
    """A name without what people write in different ways: case, spaces, hyphens, underscores."""
    return re.sub(r'[\s_-]+', '', name).casefold()


@dataclass(frozen=True)
class ClassTable:
    """Which classes the new model has, and where they come from.

    Args:
        old: foreground classes of the old model, in the order of its channels.
        drawn: name to number, for the classes that the new masks show. The name of a class that the old model
            has is the old model's.
        old_background: whether the old model has a background class.
    """

    old: tuple[str, ...]
    drawn: Mapping[str, int]
    old_background: bool

    @property
    def new(self) -> tuple[str, ...]:
        """The classes that the old model does not have, in the order in which they were named."""
        return tuple(name for name in self.drawn if name not in (BACKGROUND, *self.old))

    @property
    def matched(self) -> tuple[str, ...]:
        """The old classes that the new masks show too."""
        return tuple(name for name in self.old if name in self.drawn)

    @property
    def names(self) -> tuple[str, ...]:
        """All classes by channel of the new model, background first."""
        return (BACKGROUND, *self.old, *self.new)

    @property
    def protocol(self) -> str:
        """The protocol: the old classes, then all new ones in one stage."""
        return f'{len(self.old)}-{len(self.new)}'

    def own_names(self, numbers: Mapping[str, int], option: str) -> dict[str, int]:
        """The same numbers under the names that the classes have here.

        Raises:
            ValueError: a name is none of the classes'.
        """
        own = {_plain(name): name for name in self.names}
        unknown = [name for name in numbers if _plain(name) not in own]
        if unknown:
            raise ValueError(
                f'{option}: {unknown[0]!r} is no class of the new model{near_match(unknown[0], self.names)}; it has '
                f'{", ".join(self.names)}'
            )
        return {own[_plain(name)]: number for name, number in numbers.items()}

    def numbers_for_all(self) -> dict[str, int]:
        """Name to number for masks that show any class: those of the new masks, and free ones for the others.

        ``'ignored'`` is the number of pixels that are not used.

        Raises:
            ValueError: 8 bits are too few.
        """
        numbers = dict(self.drawn)
        for name, usual in ((BACKGROUND, 0), (IGNORED, 255), *((name, None) for name in self.old)):
            free = [number for number in range(256) if number not in (0, 255, *numbers.values())]
            if usual is not None and usual not in numbers.values():
                free.insert(0, usual)
            if name not in numbers and not free:
                raise ValueError(f'{len(self.names)} classes are too many for masks, which have 8 bits')
            numbers.setdefault(name, *free[:1])
        return numbers

    def colours(self, old: Mapping[str, Sequence[int]]) -> list[list[int]]:
        """A colour for each class by channel, RGB 0..255: the old model's, black for background, else one unlike these.

        Args:
            old: the old model's colours by name.
        """
        known = {BACKGROUND: BLACK} | {name: old[name] for name in self.names if name in old}
        lacking = [name for name in self.names if name not in known]
        chosen = distinct_colours(len(known) + len(lacking), beside=list(known.values()))[len(known) :]
        colours = known | dict(zip(lacking, chosen, strict=True))
        return [list(map(int, colours[name])) for name in self.names]

    def rows(self) -> PrettyTable:
        """What is copied, matched and made new, for a person to read."""
        table = PrettyTable(['class', 'in the old model', 'in your masks', 'in the new model', 'its classifier'])
        table.align['class'] = table.align['its classifier'] = 'l'
        shift = 0 if not self.old_background else 1
        for channel, name in enumerate(self.names):
            old = '-'
            if name in self.old:
                old, origin = self.old.index(name) + shift, 'copied'
                origin += ', and learned further: it is drawn in your masks' if name in self.matched else ''
            elif name == BACKGROUND:
                old, origin = (0, 'copied') if self.old_background else ('-', 'made new: the old model has none')
            else:
                origin = 'made new'
            number = self.drawn.get(name, 0 if name == BACKGROUND else '-')
            table.add_row([name, old, number, channel, origin])
        return table

    def look_alikes(self) -> list[str]:
        """Notes on new classes whose names are one typing error away from an old class's."""
        return [
            f'{name} is taken for a new class; the old model has {old}: if it is the same, give it that name'
            for name in self.new
            for old in self.old
            if _alike(_plain(name), _plain(old))
        ]


def _alike(one: str, other: str) -> bool:
    # In short names one letter makes another word: car and cat.
    return one.rstrip('s') == other.rstrip('s') or (min(len(one), len(other)) > 4 and one_slip(one, other))


def match_classes(old: Sequence[str], drawn: Mapping[str, int], old_background: bool) -> ClassTable:
    """Matches by name, whatever the case, spaces, hyphens and underscores.

    Args:
        old: foreground classes of the old model, in the order of its channels.
        drawn: name to number in the new masks.
        old_background: whether the old model has a background class.

    Raises:
        ValueError: no class is new.
    """
    own = {_plain(name): name for name in (BACKGROUND, *old)}
    table = ClassTable(tuple(old), {own.get(_plain(name), name): n for name, n in drawn.items()}, old_background)
    if not table.new:
        raise ValueError(
            f"classes {','.join(drawn)}: the old model has all of them ({', '.join(old)}): expected a class that it "
            "does not know. To train it further on known classes, use mmseg's own train.py with load_from"
        )
    table.numbers_for_all()
    return table
