# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Selections of exemplars on tables small enough to count by hand or by brute force."""

import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mmseg.registry import TASK_UTILS

from mmseg_sats.datasets.class_index.index import select_train
from mmseg_sats.datasets.memory.selection import (
    NONE,
    Candidates,
    ClassBalancedMemory,
    ExemplarMemory,
    most_labelled_rows,
    reservoir_rows,
    round_robin,
)
from mmseg_sats.engine.command_line import read_config
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.replay import check_replay
from mmseg_sats.protocol import Protocol
from tests.shared import shared_path

NOTHING = np.zeros(0, dtype=np.int64)
SELECTIONS = ['ClassBalancedMemory', 'RandomMemory', 'ReservoirMemory', 'MostLabelledMemory']


def table(rows: list[str], num_classes: int) -> np.ndarray:
    """Presence from strings: ``'02'`` holds the classes 0 and 2."""
    presence = np.zeros((len(rows), num_classes), dtype=bool)
    for row, classes in enumerate(rows):
        presence[row, [int(c) for c in classes]] = True
    return presence


def draw(presence: np.ndarray, size: int, seed: int = 0, kept: list[int] | None = None):
    stands_for = NOTHING if kept is None else np.array(kept, dtype=np.int64)
    return round_robin(presence, stands_for, size, np.random.default_rng(seed))


def counts(classes: np.ndarray, num_classes: int) -> list[int]:
    return [int((classes == c).sum()) for c in range(num_classes)]


def fairest(presence: np.ndarray, size: int) -> list[int]:
    """The best sorted counts of all assignments of images to classes they hold, tried one by one."""
    options = [[NONE, *np.flatnonzero(row)] for row in presence]
    best: list[int] = []
    for assigned in itertools.product(*options):
        if sum(c != NONE for c in assigned) <= size:
            found = sorted(counts(np.array(assigned), presence.shape[1]))
            best = max(best, found)
    return best


@pytest.mark.parametrize('size', [1, 4, 7, 12, 100])
@pytest.mark.parametrize('seed', [0, 1])
def test_classes_with_enough_images_differ_by_at_most_one(size: int, seed: int) -> None:
    presence = table(['0', '1', '2', '3'] * 6, 4)
    rows, classes = draw(presence, size, seed)
    assert len(rows) == len(set(rows.tolist())) == min(size, 24)
    assert max(counts(classes, 4)) - min(counts(classes, 4)) <= 1
    assert presence[rows, classes].all()


def test_a_rare_class_gets_all_it_has_and_the_others_share_the_rest() -> None:
    presence = table(['0'] * 10 + ['1'] * 10 + ['2'], 3)
    _, classes = draw(presence, 9)
    assert counts(classes, 3) == [4, 4, 1]


@pytest.mark.parametrize('seed', range(8))
def test_an_image_of_two_classes_is_left_to_the_one_that_has_no_other(seed: int) -> None:
    # Whoever begins: class 0 may take row 0, the only one that class 1 could have.
    presence = table(['01', '0', '0'], 2)
    rows, classes = draw(presence, 2, seed)
    assert sorted(classes.tolist()) == [0, 1]
    assert rows[classes == 1].tolist() == [0]


def test_the_counts_are_as_even_as_any_assignment() -> None:
    generator = np.random.default_rng(7)
    for seed in range(60):
        presence = generator.random((6, 3)) < generator.uniform(0.2, 0.7)
        size = int(generator.integers(1, 7))
        rows, classes = draw(presence, size, seed)
        assert len(set(rows.tolist())) == len(rows) <= size
        assert presence[rows, classes].all()
        assert sorted(counts(classes, 3)) == fairest(presence, size), (presence, size)


def test_room_is_given_up_from_the_end_as_classes_arrive() -> None:
    kept = [0, 0, 0, 1, 1, 1]
    presence = table(['0', '0', '0', '1', '1', '1', *['2'] * 5], 3)
    rows, classes = draw(presence, 6, kept=kept)
    assert sorted(rows[classes == 0].tolist()) == [0, 1]
    assert sorted(rows[classes == 1].tolist()) == [3, 4]
    assert counts(classes, 3) == [2, 2, 2]
    assert (rows[classes == 2] >= 6).all()


def test_old_classes_take_their_own_exemplars_before_any_new_image() -> None:
    presence = table(['0', '0', '1', '1', *['012'] * 8], 3)
    for seed in range(5):
        rows, classes = draw(presence, 6, seed, kept=[0, 0, 1, 1])
        assert sorted(rows[classes == 0].tolist()) == [0, 1]
        assert sorted(rows[classes == 1].tolist()) == [2, 3]


def test_in_a_last_round_that_is_not_full_it_is_old_exemplars_that_stay() -> None:
    presence = table(['0', '1', '1', '0', '0', '1'], 2)
    for seed in range(8):
        rows, _ = draw(presence, 3, seed, kept=[0, 1, 1])
        assert sorted(rows.tolist()) == [0, 1, 2]


def test_a_class_without_exemplars_takes_new_images_before_those_of_others() -> None:
    presence = table([*['01'] * 4, *['1'] * 3], 2)
    for seed in range(8):
        rows, classes = draw(presence, 4, seed, kept=[0, 0, 0, 0])
        assert set(rows[classes == 1].tolist()) <= {4, 5, 6}


def test_a_class_without_candidates_leaves_its_room_to_the_others() -> None:
    _, classes = draw(table(['0', '0', '2', '2'], 3), 4)
    assert counts(classes, 3) == [2, 0, 2]


def test_the_order_comes_from_seed_and_stage_alone() -> None:
    presence = table(['0', '1', '01'] * 20, 2)
    candidates = Candidates(presence, NOTHING)

    def picked(seed: int, stage: int) -> list[int]:
        np.random.seed(np.random.randint(1000))  # the global state is of no account
        return ClassBalancedMemory(8, seed).select(candidates, stage)[0].tolist()

    assert picked(0, 1) == picked(0, 1)
    assert picked(0, 1) != picked(0, 2)
    assert picked(0, 1) != picked(1, 1)


def test_every_image_that_came_by_is_as_likely_in_the_reservoir() -> None:
    found: Counter = Counter()
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        first = reservoir_rows(0, 6, 4, 0, rng)
        names = [f'a{row}' for row in first] + [f'b{row}' for row in range(6)]
        found.update(names[row] for row in reservoir_rows(4, 10, 4, 6, rng))
    assert len(found) == 12
    # 1000 expected of each, standard deviation 26.
    assert all(abs(count - 1000) < 110 for count in found.values()), found


def test_most_labelled() -> None:
    presence = table(['0', '012', '01', '02', '', '012'], 3)
    for seed in range(4):
        rows = most_labelled_rows(presence, 3, np.random.default_rng(seed)).tolist()
        assert set(rows[:2]) == {1, 5}
        assert rows[2] in (2, 3)
    alike = np.ones((20, 2), dtype=bool)
    picks = [most_labelled_rows(alike, 3, np.random.default_rng(seed)).tolist() for seed in (0, 1)]
    assert picks[0] != picks[1]  # ties are drawn


@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('size', [0, 3, 9, 50])
def test_no_selection_is_over_budget_in_any_stage(selection: str, size: int) -> None:
    memory = TASK_UTILS.build(dict(type=selection, size=size, seed=3))
    generator = np.random.default_rng(size)
    kept, stands_for = 0, NOTHING
    for stage in range(4):
        presence = generator.random((kept + 20, stage + 2)) < 0.4
        for row, c in enumerate(stands_for):
            presence[row, max(c, 0)] = True
        candidates = Candidates(presence, stands_for, offered=20 * stage)
        rows, classes = memory.select(candidates, stage)
        assert len(rows) <= size
        kept, stands_for = len(rows), classes
    assert kept == min(size, kept)
    assert kept > 0 or size == 0


@pytest.mark.parametrize('name', ['15-1', '10-1', '5-3'])
def test_the_memory_of_voc_is_balanced_after_every_stage(name: str) -> None:
    with np.load(shared_path('facts/voc12aug_class_presence.npz'), allow_pickle=False) as facts:
        presence = facts['train'].astype(bool)
    kept = stands_for = NOTHING
    for stage in Protocol(name).stages:
        new = np.setdiff1d(select_train(presence, stage, 'overlapped'), kept)
        rows = np.concatenate([kept, new])
        candidates = Candidates(presence[rows][:, list(stage.seen)], stands_for)
        picked, stands_for = ClassBalancedMemory(100).select(candidates, stage.index)
        found = counts(stands_for, len(stage.seen))
        assert sum(found) == 100
        assert max(found) - min(found) <= 1
        if stage.index:
            # At the worst every new class takes its share out of the memory.
            assert len(set(rows[picked]) & set(kept)) >= 100 - len(stage.new) * max(found)
        kept = rows[picked]


class Greedy(ExemplarMemory):
    """A selection that heeds nothing."""

    def pick(self, candidates: Candidates, rng: np.random.Generator):
        rows = np.array([0, 0, 1])[: len(candidates.presence)]
        return rows, np.full(len(rows), NONE)


def test_a_plugged_in_selection_is_held_to_its_budget() -> None:
    candidates = Candidates(table(['0', '1'], 2), NOTHING)
    with pytest.raises(RuntimeError, match='Greedy picked 2 exemplars for a budget of 1'):
        Greedy(1).select(candidates, 0)
    with pytest.raises(RuntimeError, match=r'different rows of 2 candidates, got \[0, 0\]'):
        Greedy(2).select(candidates, 0)
    with pytest.raises(ValueError, match='size of Greedy must be 0 or more, got -1'):
        Greedy(-1)


def test_candidates_are_checked() -> None:
    with pytest.raises(ValueError, match='presence must be'):
        Candidates(np.zeros((2, 2)), NOTHING)
    with pytest.raises(ValueError, match='at most 1 candidates'):
        Candidates(table(['0'], 1), np.zeros(2, dtype=np.int64))


def test_the_selection_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'path', list(sys.path))
    page = (Path(__file__).parents[1] / 'docs/memory.md').read_text()
    code, config = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    (tmp_path / 'first_memory.py').write_text(code)
    (tmp_path / 'shapes_first.py').write_text(config)
    cfg = read_config(tmp_path / 'shapes_first.py')
    set_defaults(cfg)
    check_replay(cfg, Protocol('3-1', num_classes=6))
    assert cfg.memory_selection.type == 'FirstMemory'
    memory = TASK_UTILS.build(dict(type='FirstMemory', size=2))
    rows, classes = memory.select(Candidates(table(['0', '1', '1'], 2), NOTHING), 0)
    assert (rows.tolist(), classes.tolist()) == ([0, 1], [NONE, NONE])
