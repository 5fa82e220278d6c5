# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Forgetting and the average over the stages, by hand."""

import math

import pytest

from mmseg_sats.evaluation.forgetting import average_all, forgetting, forgetting_per_class

STAGES = [
    dict(background=95.0, cat=60.0, dog=40.0),
    dict(background=90.0, cat=50.0, dog=45.0, eel=30.0),
    dict(background=85.0, cat=20.0, dog=50.0, eel=25.0, fox=70.0),
]
LEARNED = ['cat', 'dog', 'eel']


def test_best_earlier_minus_final() -> None:
    # dog is at its best in the end: what it gained counts as negative forgetting.
    expected = dict(cat=40, dog=-5, eel=5)
    assert forgetting_per_class(STAGES, LEARNED) == pytest.approx(expected)
    assert forgetting(STAGES, LEARNED) == pytest.approx(40 / 3)


def test_the_best_stage_may_be_a_middle_one() -> None:
    stages = [dict(cat=30.0), dict(cat=55.0), dict(cat=50.0)]
    assert forgetting_per_class(stages, ['cat']) == {'cat': 5}


def test_only_the_named_classes_count() -> None:
    assert forgetting(STAGES, ['cat']) == 40
    assert list(forgetting_per_class(STAGES, ['eel', 'cat'])) == ['eel', 'cat']


@pytest.mark.parametrize('nothing', [None, math.nan])
def test_absent_at_the_end(nothing: float | None) -> None:
    stages = [*STAGES[:2], dict(STAGES[2], cat=nothing)]
    assert set(forgetting_per_class(stages, LEARNED)) == {'dog', 'eel'}
    assert forgetting(stages, LEARNED) == 0


@pytest.mark.parametrize('nothing', [None, math.nan])
def test_absent_at_one_earlier_stage(nothing: float | None) -> None:
    stages = [dict(STAGES[0], cat=nothing), *STAGES[1:]]
    assert forgetting_per_class(stages, ['cat']) == {'cat': 30}


def test_absent_at_every_earlier_stage() -> None:
    stages = [dict(cat=None), {}, dict(cat=20.0)]
    assert forgetting_per_class(stages, ['cat']) == {}
    assert forgetting(stages, ['cat']) is None


def test_0_is_a_value() -> None:
    assert forgetting_per_class([dict(cat=10.0), dict(cat=0.0)], ['cat']) == {'cat': 10}
    assert forgetting_per_class([dict(cat=0.0), dict(cat=10.0)], ['cat']) == {'cat': -10}


@pytest.mark.parametrize('stages', [[], STAGES[:1]])
def test_nothing_is_forgotten_within_one_stage(stages: list) -> None:
    assert forgetting_per_class(stages, ['cat']) == {}
    assert forgetting(stages, ['cat']) is None


def test_average_all() -> None:
    assert average_all([80.0, 60.0, 40.0, 50.0]) == 57.5
    assert average_all([80.0]) == 80
    assert average_all([80.0, None, math.nan, 40.0]) == 60
    assert average_all([]) is None
    assert average_all([None]) is None
