# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which images a memory keeps: pure functions on small tables, and the registered selections.

A table row is a candidate: first the exemplars kept so far, in their order, then the stage's other
training images. A column is a seen foreground class, in learning order.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from mmseg.registry import TASK_UTILS

NONE = -1
"""In place of a class: an exemplar that was not picked for one class in particular."""

Picks = tuple[np.ndarray, np.ndarray]
"""Rows (M,) and, for each, the class (M,) it stands for or ``NONE``; both int64."""


@dataclass(frozen=True)
class Candidates:
    """What a memory may keep after a stage.

    Args:
        presence: (N, K) bool, whether candidate n holds seen class k.
        stands_for: (kept,) int64, the class that each exemplar kept so far was picked for, or
            ``NONE``; candidates 0 to kept - 1 are those exemplars.
        offered: how many images were ever candidates before this stage, for ``ReservoirMemory``.
    """

    presence: np.ndarray
    stands_for: np.ndarray
    offered: int = 0

    def __post_init__(self) -> None:
        if self.presence.ndim != 2 or self.presence.dtype != bool:
            raise ValueError(
                f'presence must be (candidates, classes) bool, got {self.presence.shape} '
                f'{self.presence.dtype}'
            )
        if self.stands_for.ndim != 1 or len(self.stands_for) > len(self.presence):
            raise ValueError(
                f'stands_for must be (kept,) with kept at most {len(self.presence)} candidates, '
                f'got {self.stands_for.shape}'
            )

    @property
    def kept(self) -> int:
        """Number of exemplars kept so far."""
        return len(self.stands_for)


def round_robin(
    presence: np.ndarray, stands_for: np.ndarray, size: int, rng: np.random.Generator
) -> Picks:
    """Class-balanced exemplars: the classes take turns in a random order and choose one image each.

    As in SSUL (Cha et al., NeurIPS 2021, section 3.4) every image stands for one class. A class
    first takes the exemplars that stand for it already, in their old order, so that it drops exemplars
    from the end; then new images, then exemplars of other classes, both in a random order. If all
    images that are left stand for other classes, one of these classes hands one over if it finds
    another instead. So no class gets too few because of the order of the turns, and the counts are as
    even as the table allows.

    Args:
        presence: (N, K) bool.
        stands_for: (kept,) int64, see :class:`Candidates`.
        size: the budget.
        rng: where the orders are drawn.

    Returns:
        At most ``size`` rows, class after class, each class's in the order taken.
    """
    turns = _Turns(_queues(presence, stands_for, rng))
    classes = [int(c) for c in rng.permutation(presence.shape[1])]
    own = [int((stands_for == c).sum()) for c in range(presence.shape[1])]
    while classes and len(turns.owner) < size:
        # In a last, incomplete round old exemplars are preferred.
        for c in sorted(classes, key=lambda c: len(turns.picked[c]) >= own[c]):
            if len(turns.owner) == size:
                break
            if not turns.take(c, {c}):
                # A class that finds no image now finds none later either: images are never given back.
                classes.remove(c)
    pairs = [(row, c) for c, rows in enumerate(turns.picked) for row in rows]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _queues(
    presence: np.ndarray, stands_for: np.ndarray, rng: np.random.Generator
) -> list[list[int]]:
    """For each class, its candidates in the order in which it wants them."""
    kept = len(stands_for)
    drawn = kept + rng.permutation(len(presence) - kept)
    drawn_kept = rng.permutation(kept)
    queues = []
    for c in range(presence.shape[1]):
        own = np.flatnonzero(stands_for == c)
        others = drawn_kept[stands_for[drawn_kept] != c]
        order = np.concatenate([own, drawn, others])
        queues.append(order[presence[order, c]].tolist())
    return queues


class _Turns:
    """Who has taken which image so far."""

    def __init__(self, queues: list[list[int]]) -> None:
        self.queues = queues
        self.picked: list[list[int]] = [[] for _ in queues]
        self.owner: dict[int, int] = {}
        self._next = [0] * len(queues)

    def take(self, c: int, asked: set[int]) -> bool:
        """One more image for class ``c``; False where there is none.

        Args:
            c: the class.
            asked: the classes that already look for an image on its behalf, itself included.
        """
        queue = self.queues[c]
        while self._next[c] < len(queue) and queue[self._next[c]] in self.owner:
            self._next[c] += 1
        if self._next[c] < len(queue):
            self._give(queue[self._next[c]], c)
            return True
        for row in queue:
            other = self.owner[row]
            if other in asked:
                continue
            asked.add(other)
            if self.take(other, asked):
                self.picked[other].remove(row)
                self._give(row, c)
                return True
        return False

    def _give(self, row: int, c: int) -> None:
        self.owner[row] = c
        self.picked[c].append(row)


def random_rows(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``size`` of ``count`` rows, each as likely as any other: (M,) int64."""
    return rng.permutation(count)[:size].astype(np.int64)


def reservoir_rows(
    kept: int, count: int, size: int, offered: int, rng: np.random.Generator
) -> np.ndarray:
    """Reservoir sampling (Vitter, 1985, algorithm R) of the new rows into the kept ones.

    Args:
        kept: rows 0 to kept - 1 are in the memory.
        count: all rows.
        size: the budget.
        offered: how many images were candidates before.
        rng: where new rows' order and places are drawn.

    Returns:
        (M,) int64 rows; after any number of stages each image that was ever a candidate is in the
        memory with the same probability.
    """
    memory = list(range(kept))[:size]
    for row in kept + rng.permutation(count - kept):
        offered += 1
        if len(memory) < size:
            memory.append(int(row))
            continue
        place = int(rng.integers(offered))
        if place < size:
            memory[place] = int(row)
    return np.array(memory, dtype=np.int64)


def most_labelled_rows(presence: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The rows with the most classes, ties drawn: (M,) int64."""
    order = rng.permutation(len(presence))
    ranked = order[np.argsort(-presence[order].sum(axis=1), kind='stable')]
    return ranked[:size].astype(np.int64)


class ExemplarMemory(ABC):
    """A selection of exemplars; a new one is a subclass with :meth:`pick`, registered in TASK_UTILS.

    Args:
        size: most exemplars, 0 or more.
        seed: all draws come from (seed, stage) alone.

    Raises:
        ValueError: a negative size.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 0:
            raise ValueError(f'size of {type(self).__name__} must be 0 or more, got {size}')
        self.size = size
        self.seed = seed

    @abstractmethod
    def pick(self, candidates: Candidates, rng: np.random.Generator) -> Picks:
        """The rows to keep, at most ``self.size``, and the class that each stands for."""

    def select(self, candidates: Candidates, stage: int) -> Picks:
        """:meth:`pick` with the stage's random generator, checked.

        Raises:
            RuntimeError: the selection is over budget, or names a row twice or one that is not there.
        """
        rows, classes = self.pick(candidates, np.random.default_rng([self.seed, stage]))
        name = type(self).__name__
        if len(rows) > self.size:
            raise RuntimeError(f'{name} picked {len(rows)} exemplars for a budget of {self.size}')
        if len(rows) != len(classes):
            raise RuntimeError(f'{name} picked {len(rows)} rows and {len(classes)} classes')
        if len(set(rows.tolist())) < len(rows) or not np.isin(
            rows, np.arange(len(candidates.presence))
        ).all():
            raise RuntimeError(
                f'{name} must pick different rows of {len(candidates.presence)} candidates, '
                f'got {rows.tolist()}'
            )
        return rows, classes


def _for_no_class(rows: np.ndarray) -> Picks:
    return rows, np.full(len(rows), NONE, dtype=np.int64)


@TASK_UTILS.register_module()
class ClassBalancedMemory(ExemplarMemory):
    """Balanced to within one image per class where the data allows, see :func:`round_robin`."""

    def pick(self, candidates: Candidates, rng: np.random.Generator) -> Picks:
        """As :meth:`ExemplarMemory.pick` says."""
        return round_robin(candidates.presence, candidates.stands_for, self.size, rng)


@TASK_UTILS.register_module()
class RandomMemory(ExemplarMemory):
    """Candidates drawn with equal probability; most of them come from the newest stage."""

    def pick(self, candidates: Candidates, rng: np.random.Generator) -> Picks:
        """As :meth:`ExemplarMemory.pick` says."""
        return _for_no_class(random_rows(len(candidates.presence), self.size, rng))


@TASK_UTILS.register_module()
class ReservoirMemory(ExemplarMemory):
    """Every image that was ever a candidate, with equal probability, see :func:`reservoir_rows`."""

    def pick(self, candidates: Candidates, rng: np.random.Generator) -> Picks:
        """As :meth:`ExemplarMemory.pick` says."""
        count, offered = len(candidates.presence), candidates.offered
        return _for_no_class(reservoir_rows(candidates.kept, count, self.size, offered, rng))


@TASK_UTILS.register_module()
class MostLabelledMemory(ExemplarMemory):
    """The images with the most seen classes, see :func:`most_labelled_rows`."""

    def pick(self, candidates: Candidates, rng: np.random.Generator) -> Picks:
        """As :meth:`ExemplarMemory.pick` says."""
        return _for_no_class(most_labelled_rows(candidates.presence, self.size, rng))
