# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""IncrementalIoUMetric: by hand, by brute force, and against mmseg's IoUMetric."""

import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from mmseg_sats.evaluation.incremental_iou import IncrementalIoUMetric

area_counts = IncrementalIoUMetric.area_counts
ious = IncrementalIoUMetric.ious
summary = IncrementalIoUMetric.summary


def sample(pred: Sequence, label: Sequence, path: str = 'a.png') -> dict:
    pred, label = torch.as_tensor(pred), torch.as_tensor(label)
    return dict(
        pred_sem_seg=dict(data=pred[None]), gt_sem_seg=dict(data=label[None]), img_path=path
    )


def metric(num_classes: int, num_base: int | None = 2, **options) -> IncrementalIoUMetric:
    result = IncrementalIoUMetric(num_base=num_base, **options)
    names = ['background', 'cat', 'dog', 'eel', 'fox'][:num_classes]
    result.dataset_meta = dict(classes=names)
    return result


def evaluate(samples: list[dict], num_classes: int, num_base: int | None = 2, **options) -> dict:
    m = metric(num_classes, num_base, **options)
    m.process({}, samples)
    return m.evaluate(len(samples))


def brute_force(pred: np.ndarray, label: np.ndarray, num_classes: int, ignore: int) -> list:
    counts = [[0] * num_classes for _ in range(3)]
    for p, t in zip(pred.ravel().tolist(), label.ravel().tolist(), strict=True):
        if t == ignore:
            continue
        counts[0][p] += p == t
        counts[1][p] += 1
        counts[2][t] += 1
    return counts


def random_maps(seed: int, num_classes: int, ignored: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pred = rng.integers(0, num_classes, (9, 13))
    label = np.where(rng.random((9, 13)) < 0.5, pred, rng.integers(0, num_classes, (9, 13)))
    if ignored:
        label[rng.random((9, 13)) < 0.2] = 255
    return pred, label


# --- the arithmetic -------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    pred = torch.tensor([[0, 1, 1], [2, 2, 0]])
    label = torch.tensor([[0, 1, 2], [2, 255, 1]])
    expected = [[1, 1, 1, 0], [2, 2, 1, 0], [1, 2, 2, 0]]
    counts = area_counts(pred, label, 4)
    assert counts.dtype == np.int64
    assert counts.tolist() == expected


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('ignore', [255, 2])
def test_counts_by_brute_force(seed: int, ignore: int) -> None:
    pred, label = random_maps(seed, 4)
    label[label == 255] = ignore
    counts = area_counts(torch.from_numpy(pred), torch.from_numpy(label), 4, ignore)
    assert counts.tolist() == brute_force(pred, label, 4, ignore)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_counts_do_not_overflow_narrow_types(dtype: torch.dtype) -> None:
    # 150 * 151 + 150 would not fit uint8.
    pred = torch.full((20, 30), 150, dtype=dtype)
    counts = area_counts(pred, pred.clone(), 151)
    assert counts[:, 150].tolist() == [600] * 3
    assert counts.sum() == 1800


def test_an_image_of_ignored_pixels_counts_nothing() -> None:
    label = torch.full((2, 2), 255)
    assert area_counts(torch.zeros_like(label), label, 3).tolist() == [[0] * 3] * 3


def test_ious_by_hand() -> None:
    # Predicted and labelled in part; in neither; predicted alone; labelled alone.
    counts = np.array([[1, 1, 0, 0, 0], [2, 2, 0, 3, 0], [1, 3, 0, 0, 2]])
    np.testing.assert_allclose(ious(counts), [50, 25, math.nan, math.nan, 0])


@pytest.mark.parametrize(
    ('iou', 'num_base', 'base', 'new', 'total', 'harmonic'),
    [
        ([90, 70, 20, 40], 2, 80, 30, 55, 2 * 80 * 30 / 110),
        ([90, math.nan, 20, 40], 2, 90, 30, 50, 45),
        ([90, 60, 0, 0], 2, 75, 0, 37.5, 0),
        ([0, 0, 0, 0], 2, 0, 0, 0, 0),
        ([90, 70, 20], 3, 60, math.nan, 60, math.nan),
        ([90, 70, math.nan], 2, 80, math.nan, 80, math.nan),
        ([math.nan, 40], 1, math.nan, 40, 40, math.nan),
    ],
)
def test_summary(
    iou: list, num_base: int, base: float, new: float, total: float, harmonic: float
) -> None:
    expected = dict(mIoU_base=base, mIoU_new=new, mIoU_all=total, hIoU=harmonic, mIoU=total)
    result = summary(np.array(iou, dtype=float), num_base)
    assert result == pytest.approx(expected, nan_ok=True)


# --- the metric -----------------------------------------------------------------------------------


def test_known_values() -> None:
    samples = [
        sample([[0, 0], [1, 1]], [[0, 0], [1, 0]]),
        sample([[2, 2], [0, 1]], [[2, 0], [255, 1]]),
    ]
    # background: 2 of 4 (predicted 2, labelled 4, the ignored one not counted).
    # cat: 2 of 3; dog: 1 of 2.
    result = evaluate(samples, 3)
    expected = {'IoU.background': 50, 'IoU.cat': 200 / 3, 'IoU.dog': 50,
                'mIoU_base': 175 / 3, 'mIoU_new': 50, 'mIoU_all': 500 / 9, 'mIoU': 500 / 9,
                'hIoU': 2 * 175 / 3 * 50 / (175 / 3 + 50),
                'classes_base': 2, 'classes_new': 1, 'classes_all': 3}  # fmt: skip
    assert result == pytest.approx(expected, abs=1e-12)
    assert all(type(value) in (float, int) for value in result.values())


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_areas_are_summed_over_images_whatever_the_batches(batch: int) -> None:
    maps = [random_maps(seed, 4) for seed in range(5)]
    m = metric(4)
    for start in range(0, 5, batch):
        m.process({}, [sample(*pair) for pair in maps[start : start + batch]])
    assert len(m.results) == 5
    total = np.sum([brute_force(*pair, 4, 255) for pair in maps], axis=0)
    expected = 100 * total[0] / (total[1] + total[2] - total[0])
    result = m.evaluate(5)
    assert [result[f'IoU.{name}'] for name in m.dataset_meta['classes']] == pytest.approx(
        expected.tolist()
    )


@pytest.mark.parametrize('ignored', [False, True])
def test_agrees_with_mmseg(ignored: bool) -> None:
    samples = [sample(*random_maps(seed, 5, ignored)) for seed in range(6)]
    theirs = IoUMetric(iou_metrics=['mIoU'])
    theirs.dataset_meta = dict(classes=['background', 'cat', 'dog', 'eel', 'fox'])
    theirs.process({}, samples)
    # mmseg rounds to two digits.
    expected = theirs.evaluate(6)['mIoU']
    assert round(evaluate(samples, 5)['mIoU'], 2) == pytest.approx(expected, abs=0.0101)


def test_an_absent_class_is_nan_and_left_out() -> None:
    result = evaluate([sample([[0, 1]], [[0, 1]])], 4)
    assert math.isnan(result['IoU.dog'])
    assert math.isnan(result['mIoU_new'])
    assert math.isnan(result['hIoU'])
    assert result['mIoU_base'] == result['mIoU_all'] == result['mIoU'] == 100


def means_by_loops(pairs: list, num_classes: int, num_base: int) -> tuple[dict, dict]:
    """Base, new and all by counting sets of pixels, over the classes that a pixel truly shows."""
    pixels = [
        (i, t, p)
        for i, (pred, label) in enumerate(pairs)
        for t, p in zip(label.ravel().tolist(), pred.ravel().tolist(), strict=True)
        if t != 255
    ]
    shown = [c for c in range(num_classes) if any(t == c for _, t, _ in pixels)]
    iou = {
        c: 100 * sum(t == p == c for _, t, p in pixels) / sum(c in (t, p) for _, t, p in pixels) for c in shown
    }
    groups = dict(base=[c for c in shown if c < num_base], new=[c for c in shown if c >= num_base], all=shown)
    means = {k: sum(iou[c] for c in group) / len(group) if group else math.nan for k, group in groups.items()}
    return means, {k: len(group) for k, group in groups.items()}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('absent', [(), (0,), (3,), (0, 2), (0, 1), (3, 4), (0, 1, 3, 4)])
def test_means_go_over_the_classes_that_a_labelled_pixel_shows(seed: int, absent: tuple) -> None:
    # Predictions show every class, labels all but the absent ones: those pixels are ignored there.
    pairs = [random_maps(10 * seed + i, 5) for i in range(3)]
    for _, label in pairs:
        label[np.isin(label, absent)] = 255
    result = evaluate([sample(*pair) for pair in pairs], 5)
    means, counts = means_by_loops(pairs, 5, 2)
    assert {k: result[f'mIoU_{k}'] for k in means} == pytest.approx(means, nan_ok=True)
    assert {k: result[f'classes_{k}'] for k in counts} == counts
    assert counts['all'] == 5 - len(absent)


def test_one_wrong_pixel_of_an_absent_class_does_not_turn_the_order() -> None:
    # Street images: no pixel is background. The better of two predictions calls one pixel background.
    label = [[1] * 10 + [2] * 10]
    worse = evaluate([sample([[1] * 16 + [2] * 4], label)], 3)
    better = evaluate([sample([[1] * 10 + [0] + [2] * 9], label)], 3)
    assert math.isnan(better['IoU.background'])
    assert better['mIoU_base'] == 100
    assert better['mIoU_all'] == 95
    assert worse['mIoU_all'] < better['mIoU_all']
    assert worse['classes_all'] == better['classes_all'] == 2


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    result = evaluate([sample([[0, 0]], [[0, 2]])], 3)
    assert result['IoU.dog'] == result['mIoU_new'] == 0


def test_nothing_new_in_stage_0() -> None:
    result = evaluate([sample([[0, 1]], [[0, 1]])], 2, num_base=2)
    assert math.isnan(result['mIoU_new'])
    assert math.isnan(result['hIoU'])
    assert result['mIoU_base'] == result['mIoU_all'] == 100


def test_future_as_background_is_a_false_positive_and_as_ignore_is_not() -> None:
    # The last pixel shows a class that is not learned yet; the model calls it a cat.
    pred = [[0, 1, 1]]
    as_background = evaluate([sample(pred, [[0, 1, 0]])], 2)
    ignored = evaluate([sample(pred, [[0, 1, 255]])], 2)
    assert (as_background['IoU.cat'], as_background['IoU.background']) == (50, 50)
    assert (ignored['IoU.cat'], ignored['IoU.background']) == (100, 100)


def test_another_ignore_index() -> None:
    samples = [sample([[0, 1, 1]], [[0, 1, 9]])]
    assert evaluate(samples, 2, ignore_index=9)['mIoU'] == 100


def test_num_base_from_the_data_set() -> None:
    m = IncrementalIoUMetric()
    m.dataset_meta = dict(classes=['background', 'cat', 'dog'], num_base=1)
    m.process({}, [sample([[0, 1, 2]], [[0, 1, 1]])])
    result = m.evaluate(1)
    assert (result['mIoU_base'], result['mIoU_new']) == (100, 50)


def test_the_argument_goes_before_the_data_set() -> None:
    m = IncrementalIoUMetric(num_base=2)
    m.dataset_meta = dict(classes=['background', 'cat', 'dog'], num_base=1)
    m.process({}, [sample([[0, 1, 2]], [[0, 1, 1]])])
    assert m.evaluate(1)['mIoU_base'] == 75


def test_padding_of_the_sampler_is_dropped() -> None:
    m = metric(2)
    m.process({}, [sample([[0, 1]], [[0, 1]]), sample([[1, 0]], [[0, 1]])])
    assert m.evaluate(size=2)['mIoU'] == pytest.approx(100 / 3)
    m.process({}, [sample([[0, 1]], [[0, 1]]), sample([[1, 0]], [[0, 1]])])
    # Ranks gather by slicing to the size of the data set, hence one result per image.
    assert m.compute_metrics(m.results[:1])['mIoU'] == 100


def test_prefix_and_registry() -> None:
    m = METRICS.build(dict(type='IncrementalIoUMetric', num_base=1, prefix='val'))
    m.dataset_meta = dict(classes=['background', 'cat'])
    m.process({}, [sample([[0, 1]], [[0, 1]])])
    assert m.evaluate(1)['val/mIoU_all'] == 100


def test_the_table_names_every_class_and_its_group() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(record.getMessage().splitlines())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        evaluate([sample([[0, 1, 2]], [[0, 1, 1]])], 3)
    finally:
        logger.removeHandler(handler)
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert ['cat', '50.00', 'base'] in rows
    assert ['dog', '-', 'new'] in rows
    assert ['75.00', '-', '75.00', '-'] in rows
    assert lines[-1] == 'the means go over 2 of 3 classes: no evaluation pixel shows dog'


# --- errors ---------------------------------------------------------------------------------------


def test_num_base_missing() -> None:
    m = metric(2, num_base=None)
    m.process({}, [sample([[0, 1]], [[0, 1]])])
    with pytest.raises(ValueError, match='num_base'):
        m.evaluate(1)


def test_dataset_meta_missing() -> None:
    with pytest.raises(ValueError, match="'classes'"):
        IncrementalIoUMetric(num_base=1).process({}, [sample([[0]], [[0]])])


def test_num_base_out_of_range() -> None:
    with pytest.raises(ValueError, match='at least 1, got 0'):
        IncrementalIoUMetric(num_base=0)
    with pytest.raises(ValueError, match=r'num_base is 4, expected 1\.\.3'):
        evaluate([sample([[0]], [[0]])], 3, num_base=4)


def test_shapes_that_differ_name_the_image() -> None:
    with pytest.raises(ValueError, match=r'street\.png.*\(1, 2\).*\(1, 3\)'):
        metric(2).process({}, [sample([[0, 1]], [[0, 1, 1]], path='street.png')])


@pytest.mark.parametrize(
    ('pred', 'label', 'which'),
    [
        (0, 7, 'label'),
        (7, 0, 'prediction'),
        (0, -1, 'label'),
        (0, 2, 'label'),  # the first number behind the classes
        (2, 0, 'prediction'),
    ],
)
def test_values_that_no_class_has_name_the_image(pred: int, label: int, which: str) -> None:
    with pytest.raises(ValueError, match=rf'street\.png: {which} holds .*expected 0\.\.1'):
        metric(2).process({}, [sample([[0, pred]], [[0, label]], path='street.png')])
