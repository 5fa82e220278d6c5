# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Unknown pixels: from a folder of maps, computed, or all of the background."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from PIL import Image

from mmseg_sats.datasets import IncrementalDataset, MarkUnknown, RelabelSegMap
from mmseg_sats.datasets.saliency import spectral_residual
from mmseg_sats.protocol import UNKNOWN_LABEL

SIZE = (48, 64)
NAMES = ('a', 'b')


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Image and where its one object is: a textured patch on a smooth slope."""
    image = np.tile(np.linspace(80, 120, 128, dtype=np.uint8), (96, 1))
    there = np.zeros(image.shape, bool)
    there[30:54, 70:100] = True
    generator = np.random.default_rng(0)
    image[there] = generator.integers(0, 255, there.sum())
    return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), there


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images of three vertical bands, their masks (0, 1, 2) and maps salient on the left half."""
    for folder in ('img', 'ann', 'saliency'):
        (tmp_path / folder).mkdir()
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 20:40], mask[:, 40:50], mask[:, 50:] = 1, 2, 0
    mask[0] = 255
    saliency = np.zeros(SIZE, np.uint8)
    saliency[:, :32] = 1
    generator = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(generator.integers(0, 255, (*SIZE, 3), np.uint8)).save(tmp_path / f'img/{name}.png')
        Image.fromarray(mask).save(tmp_path / f'ann/{name}.png')
        Image.fromarray(saliency).save(tmp_path / f'saliency/{name}.png')
    return tmp_path


def dataset(data: Path, pipeline: list[dict], mode: str = 'train', **mark: Any) -> IncrementalDataset:
    mark = dict(type='MarkUnknown', saliency='folder', folder=str(data / 'saliency')) | mark
    wrapped = dict(
        type='BaseSegDataset',
        data_root=str(data),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        img_suffix='.png',
        metainfo=dict(classes=('background', 'ant', 'bee'), palette=[[0] * 3, [1] * 3, [2] * 3]),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *pipeline],
    )
    return IncrementalDataset(wrapped, '1-1', 0, mode=mode, label_transforms=[mark])


def expected_labels() -> np.ndarray:
    """Stage 0 of 1-1: the second band is background of the stage, but not salient."""
    labels = np.zeros(SIZE, np.uint8)
    labels[:, :20], labels[:, 20:40] = UNKNOWN_LABEL, 1
    labels[0] = 255
    return labels


def test_the_salient_background_of_the_stage_is_unknown(data: Path) -> None:
    result = dataset(data, [])[0]
    assert np.array_equal(result['gt_seg_map'], expected_labels())


def test_future_classes_may_be_unknown(data: Path) -> None:
    labels = dataset(data, [], saliency='everything', folder=None)[0]['gt_seg_map']
    expected = np.where(expected_labels() == 0, UNKNOWN_LABEL, expected_labels())
    assert np.array_equal(labels, expected)
    assert (labels[1:, 40:] == UNKNOWN_LABEL).all()


@TRANSFORMS.register_module()
class LabelsAsImage(BaseTransform):
    """Paints the labels into the image, which then shows what became of each pixel."""

    def transform(self, results: dict) -> dict:
        results['img'] = np.repeat(results['gt_seg_map'][..., None], 3, axis=2)
        return results


def test_it_is_scaled_cropped_and_flipped_along(data: Path) -> None:
    pipeline = [
        dict(type='LabelsAsImage'),
        dict(type='RandomResize', scale=(512, 96), ratio_range=(2.0, 2.0), keep_ratio=True,
             interpolation='nearest'),
        dict(type='RandomCrop', crop_size=(40, 150)),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackSegInputs'),
    ]  # fmt: skip
    np.random.seed(1)
    seen = set()
    for _ in range(4):
        data_sample = dataset(data, pipeline)[0]
        labels = data_sample['data_samples'].gt_sem_seg.data[0].numpy()
        assert labels.shape == (40, 150)
        assert np.array_equal(labels, data_sample['inputs'][0].numpy())
        seen |= set(np.unique(labels).tolist())
    assert seen >= {0, 1, UNKNOWN_LABEL}


def test_it_stands_directly_behind_the_relabelling(data: Path) -> None:
    kinds = [type(t) for t in dataset(data, [dict(type='RandomFlip', prob=0.5)]).pipeline.transforms]
    place = kinds.index(RelabelSegMap)
    assert kinds[place + 1] is MarkUnknown
    assert kinds[place - 1].__name__ == 'LoadAnnotations'


def test_evaluation_has_no_unknown_label(data: Path) -> None:
    with pytest.raises(ValueError, match=r"label_transforms are for training, got mode='eval'"):
        dataset(data, [], mode='eval')


def test_a_missing_map_is_named_before_training(data: Path) -> None:
    (data / 'saliency/b.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'saliency/b.png does not exist \(1 missing in all\)'):
        dataset(data, [])


def test_a_map_that_vanishes_is_named(data: Path) -> None:
    images = dataset(data, [])
    (data / 'saliency/a.png').unlink()
    with pytest.raises(RuntimeError, match=r'img/a.png .*saliency/a.png does not exist'):
        images[0]


def test_a_map_of_another_size_is_named(data: Path) -> None:
    Image.fromarray(np.ones((5, 7), np.uint8)).save(data / 'saliency/a.png')
    with pytest.raises(RuntimeError, match=r'img/a.png is of size \(5, 7\), its labels are \(48, 64\)'):
        dataset(data, [])[0]


@pytest.mark.parametrize('mode', ['L', 'P', 'RGB'])
def test_maps_of_any_kind_are_salient_where_not_0(data: Path, mode: str) -> None:
    saliency = np.zeros(SIZE, np.uint8)
    saliency[:, :32] = 1
    image = Image.fromarray(saliency)
    if mode == 'P':
        # The first colour is not black: numbers count, not colours.
        image = image.convert('P')
        image.putpalette([9, 9, 9, 0, 0, 0])
    image.convert(mode).save(data / 'saliency/a.png')
    assert np.array_equal(dataset(data, [])[0]['gt_seg_map'], expected_labels())


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(saliency='folders'), ValueError, "did you mean 'folder'"),
    (dict(saliency='folder'), ValueError, 'goes with a folder of maps'),
    (dict(folder='.'), ValueError, 'and no other does'),
    (dict(saliency='folder', folder='nowhere'), FileNotFoundError, 'maps nowhere does not exist')])
def test_wrong_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MarkUnknown(**options)


def test_an_image_is_asked_for() -> None:
    with pytest.raises(KeyError, match="needs 'img': put it behind LoadImageFromFile"):
        MarkUnknown()(dict(gt_seg_map=np.zeros(SIZE, np.uint8)))


def test_spectral_residual_finds_the_odd_patch() -> None:
    image, there = scene()
    saliency = spectral_residual(image)
    assert saliency.shape == there.shape
    assert saliency.min() >= 0
    assert saliency[there].mean() > 5 * saliency[~there].mean()
    labels = MarkUnknown()(dict(img=image, gt_seg_map=np.zeros(there.shape, np.uint8)))['gt_seg_map']
    unknown = labels == UNKNOWN_LABEL
    assert set(np.unique(labels)) == {0, UNKNOWN_LABEL}
    assert unknown[there].mean() > 0.95
    assert unknown[~there].mean() < 0.15


def test_spectral_residual_by_the_formula() -> None:
    """At 64 pixels a side no resizing is left: log spectrum minus its 3x3 mean, transformed back."""
    image = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    spectrum = np.fft.fft2(image.astype(float))
    amplitude = np.log(np.abs(spectrum))
    padded = np.pad(amplitude, 1, mode='reflect')
    mean = sum(padded[i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9
    back = np.fft.ifft2(np.exp(amplitude - mean) * spectrum / np.abs(spectrum))
    expected = cv2.GaussianBlur(np.abs(back) ** 2, (0, 0), 2.5)
    np.testing.assert_allclose(spectral_residual(image), expected, rtol=1e-3)


def test_an_even_image_has_nothing_salient() -> None:
    results = dict(img=np.full((40, 50, 3), 90, np.uint8), gt_seg_map=np.zeros((40, 50), np.uint8))
    assert (MarkUnknown()(results)['gt_seg_map'] == 0).all()
    assert (spectral_residual(np.full((90, 120, 3), 77, np.uint8)) == 0).all()
