# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Protocols: the stages of well-known names by hand, and what malformed input says."""

import subprocess
import sys

import numpy as np
import pytest

from mmseg_sats import protocol as protocol_module
from mmseg_sats.protocol import Protocol, Stage


@pytest.mark.parametrize(
    ('name', 'num_classes', 'sizes'),
    [
        ('15-1', 20, [15, 1, 1, 1, 1, 1]),
        ('15-5', 20, [15, 5]),
        ('10-1', 20, [10] + [1] * 10),
        ('5-3', 20, [5, 3, 3, 3, 3, 3]),
        ('19-1', 20, [19, 1]),
        ('100-10', 150, [100, 10, 10, 10, 10, 10]),
        ('100-50', 150, [100, 50]),
        ('25-25', 150, [25] * 6),
        ('3-1', 6, [3, 1, 1, 1]),
        ('10-4', 20, [10, 4, 4, 2]),
        ('15-10', 20, [15, 5]),
        ('20-1', 20, [20]),
        ('1-1', 1, [1]),
        ('joint', 20, [20]),
    ],
)
def test_sizes_of_stages(name, num_classes, sizes):
    stages = Protocol(name, num_classes=num_classes).stages
    assert [len(stage.new) for stage in stages] == sizes
    assert [stage.index for stage in stages] == list(range(len(sizes)))
    for stage in stages:
        assert stage.old + stage.new + stage.future == tuple(range(1, num_classes + 1))


def test_stage_in_the_middle_by_hand():
    stage = Protocol('2-2', num_classes=5).stages[1]
    assert stage == Stage(index=1, new=(3, 4), old=(1, 2), future=(5,))
    assert stage.seen == (1, 2, 3, 4)
    assert (stage.num_old, stage.num_channels) == (3, 5)


def test_first_stage_knows_background_alone_before():
    stage = Protocol('2-2', num_classes=5).stages[0]
    assert (stage.old, stage.num_old, stage.num_channels) == ((), 1, 3)


def test_class_order_and_its_inverse():
    order = (4, 2, 5, 1, 3)
    protocol = Protocol('2-1', num_classes=5, class_order=order)
    assert [stage.new for stage in protocol.stages] == [(4, 2), (5,), (1,), (3,)]
    assert protocol.stages[2].old == (4, 2, 5)
    assert protocol.base == (4, 2)
    assert protocol.channels(1) == {4: 1, 2: 2, 5: 3}
    channels = protocol.channels(protocol.stages[-1])
    assert channels == {4: 1, 2: 2, 5: 3, 1: 4, 3: 5}
    inverse = [channels[class_id] for class_id in range(1, 6)]
    back = Protocol('2-1', num_classes=5, class_order=inverse)
    assert [order[c - 1] for c in back.class_order] == [1, 2, 3, 4, 5]


def test_joint_borrows_its_base_classes():
    joint = Protocol('joint', num_classes=20, split='15-1')
    assert joint.stages == (Stage(0, new=tuple(range(1, 21)), old=(), future=()),)
    assert (joint.base, joint.num_base) == (tuple(range(1, 16)), 16)
    shuffled = Protocol('joint', num_classes=4, class_order=(3, 1, 4, 2), split='2-1')
    assert shuffled.base == (3, 1)


def test_joint_alone_counts_all_classes_as_base():
    assert Protocol('joint', num_classes=20).num_base == 21


def test_split_beside_another_name():
    with pytest.raises(ValueError, match=r"split='10-1'.*'joint' alone.*'15-1'"):
        Protocol('15-1', num_classes=20, split='10-1')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('15', "'15' is not of the form 'm-n'"),
        ('15_1', "'15_1'.*for example '15-1'"),
        ('15-1-1', 'not of the form'),
        ('Joint', "'Joint'.*'joint'"),
        ('', 'not of the form'),
        ('-1-1', 'not of the form'),
        ('15-1 ', 'not of the form'),
        ('0-1', 'at least 1'),
        ('15-0', 'at least 1'),
        ('21-1', "'21-1' starts with 21 classes.*only 20.*'19-1'"),
    ],
)
def test_malformed_names(name, message):
    with pytest.raises(ValueError, match=message):
        Protocol(name, num_classes=20)
    with pytest.raises(ValueError, match=message):
        Protocol('joint', num_classes=20, split=name)


@pytest.mark.parametrize(
    ('order', 'message'),
    [
        ([1, 2, 2, 4], r'repeats \[2\]'),
        ([0, 1, 2, 3], 'names 0, which is background'),
        ([1, 2, 3], r'3 of 4 classes, \[4\] are missing'),
        ([1, 2, 3, 4, 5], r'do not exist: \[5\]'),
        ([1, 2, 3, -4], r'do not exist: \[-4\]'),
        ([1, 2, 3, 4, 4], r'repeats \[4\]'),
    ],
)
def test_class_orders_that_are_no_permutation(order, message):
    with pytest.raises(ValueError, match=message):
        Protocol('2-1', num_classes=4, class_order=order)


@pytest.mark.parametrize('order', [['a', 'b'], [1.0, 2.0], 3])
def test_class_order_of_the_wrong_type(order):
    with pytest.raises(TypeError, match=r'class_order=.*permutation of 1\.\.2'):
        Protocol('1-1', num_classes=2, class_order=order)


def test_numbers_and_names_of_the_wrong_type():
    with pytest.raises(ValueError, match='at least 1 foreground class, got 0'):
        Protocol('1-1', num_classes=0)
    with pytest.raises(TypeError, match=r"num_classes must be an int, got '20'"):
        Protocol('1-1', num_classes='20')
    with pytest.raises(TypeError, match=r"such as '15-1', got 15"):
        Protocol(15, num_classes=20)
    with pytest.raises(TypeError, match='num_classes must be an int, got True'):
        Protocol('1-1', num_classes=True)
    with pytest.raises(TypeError, match=r'stage must be an int, got 1\.0'):
        Protocol('15-1').stage(1.0)


def test_numbers_may_be_numpys():
    protocol = Protocol('15-1', np.int64(20))
    assert protocol.stage(np.int32(1)) == Protocol('15-1').stage(1)
    assert type(protocol.num_classes) is int


@pytest.mark.parametrize('index', [6, -1])
def test_stage_that_does_not_exist(index):
    with pytest.raises(ValueError, match=rf"stage={index}: protocol '15-1'.*stages 0 to 5"):
        Protocol('15-1', num_classes=20).stage(index)


def test_the_ground_needs_no_stack():
    # By path: importing it as a module would run the package's __init__ first.
    code = (
        'import runpy, sys; runpy.run_path(sys.argv[1]);'
        'print(sorted({"torch", "numpy", "mmseg", "mmengine"} & set(sys.modules)))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, protocol_module.__file__],
        capture_output=True, text=True, check=True,
    )
    assert done.stdout.strip() == '[]'
