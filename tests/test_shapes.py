# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The drawn data set: the same everywhere, balanced, exact masks, whole folders only."""

import hashlib
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmseg.registry import DATASETS

from mmseg_sats.datasets.shapes import dataset as shapes
from mmseg_sats.datasets.shapes import drawing as shapes_drawing
from mmseg_sats.datasets.shapes.dataset import ShapesDataset, check_split, draw_split
from mmseg_sats.datasets.shapes.drawing import (
    MAX_CLASSES,
    class_names,
    class_palette,
    draw_scene,
    scene_classes,
    shape_class,
)

ROOT = Path(__file__).parents[1]
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]


def digest(index: int, **options) -> str:
    image, mask = draw_scene(index, **options)
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


def build(root: Path, **options) -> ShapesDataset:
    options = dict(dict(num_images=4, image_size=32), **options)
    return ShapesDataset(data_root=str(root), **options)


# --- scenes ---------------------------------------------------------------------------------------


def test_a_scene_is_the_same_in_another_process() -> None:
    code = (
        'from tests.test_shapes import digest;'
        "print(digest(17), digest(3, split='val', num_classes=9, image_size=40, seed=5))"
    )
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=dict(os.environ, PYTHONHASHSEED='123', OMP_NUM_THREADS='1'),
    )  # fmt: skip
    here = [digest(17), digest(3, split='val', num_classes=9, image_size=40, seed=5)]
    assert run.stdout.split()[-2:] == here


def test_a_scene_does_not_depend_on_those_before_it_or_on_global_seeds() -> None:
    np.random.seed(1)
    alone = digest(5)
    np.random.seed(2)
    assert [digest(index) for index in range(6)][5] == alone


def test_split_seed_and_index_give_other_scenes() -> None:
    others = [
        digest(index, split=split, seed=seed)
        for index in (0, 1) for split in ('train', 'val') for seed in (0, 1)
    ]  # fmt: skip
    assert len(set(others)) == len(others)


def test_masks_hold_exactly_the_classes_of_the_scene() -> None:
    for index in range(60):
        image, mask = draw_scene(index, image_size=48)
        assert image.shape == (48, 48, 3)
        assert mask.shape == (48, 48)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, *scene_classes(index)}


def test_every_number_of_classes_occurs() -> None:
    for low, high in ((1, 3), (2, 2), (1, 5)):
        scenes = [scene_classes(index, classes_per_image=(low, high)) for index in range(60)]
        assert {len(scene) for scene in scenes} == set(range(low, high + 1))
        assert all(len(set(scene)) == len(scene) for scene in scenes)


def test_no_more_classes_in_a_scene_than_there_are() -> None:
    scenes = [scene_classes(index, num_classes=2, classes_per_image=(3, 3)) for index in range(8)]
    assert all(sorted(scene) == [1, 2] for scene in scenes)


def test_classes_are_balanced() -> None:
    scenes = [scene_classes(index) for index in range(240)]
    images = Counter(label for scene in scenes for label in scene)
    first = Counter(scene[0] for scene in scenes)
    assert first == dict.fromkeys(range(1, 7), 40)
    assert set(images) == set(range(1, 7))
    assert min(images.values()) >= 60
    assert max(images.values()) <= 1.4 * min(images.values())


def test_pixels_are_balanced() -> None:
    # A class with far fewer pixels than the others would be never learned.
    pixels = np.zeros(7)
    for index in range(120):
        pixels += np.bincount(draw_scene(index)[1].ravel(), minlength=7)
    assert pixels[1:].max() < 2.2 * pixels[1:].min()
    assert 0.6 < pixels[0] / pixels.sum() < 0.9


def test_shapes_occlude_one_another_without_vanishing(monkeypatch: pytest.MonkeyPatch) -> None:
    covered, smallest = 0, 1.0
    place = shapes_drawing._place

    def watch(rng, instances, instance, contours):
        nonlocal covered, smallest
        result = place(rng, instances, instance, contours)
        before = np.bincount(instances.ravel(), minlength=instance)[1:]
        hidden = np.bincount(instances[result[0] > 127], minlength=instance)[1:]
        covered += int(hidden.sum() > 0)
        smallest = min([smallest, *(1 - hidden / before)])
        return result

    monkeypatch.setattr(shapes_drawing, '_place', watch)
    for index in range(60):
        draw_scene(index)
    assert covered >= 15
    assert 0.7 <= smallest < 0.95


def test_crowded_scenes_can_be_drawn() -> None:
    for index in range(10):
        options = dict(num_classes=20, classes_per_image=(10, 10))
        _, mask = draw_scene(index, image_size=48, **options)
        assert set(np.unique(mask)) == {0, *scene_classes(index, **options)}


def test_colour_alone_does_not_tell_the_first_six() -> None:
    hues = [shape_class(label).hue for label in range(1, 7)]
    assert hues[:3] == hues[3:]
    assert len({shape_class(label).outline for label in range(1, 7)}) == 6


# --- classes --------------------------------------------------------------------------------------


def test_200_classes_differ_and_can_be_drawn() -> None:
    assert len({shape_class(label) for label in range(1, MAX_CLASSES + 1)}) == MAX_CLASSES
    seen = set()
    for index in range(MAX_CLASSES):
        _, mask = draw_scene(index, num_classes=MAX_CLASSES, image_size=32)
        seen |= set(np.unique(mask).tolist())
    assert seen == set(range(MAX_CLASSES + 1))


def test_names_and_palette_are_distinct_and_of_the_right_length() -> None:
    for num_classes in (1, 6, 41, MAX_CLASSES):
        names, palette = class_names(num_classes), class_palette(num_classes)
        assert len(set(names)) == len(names) == num_classes + 1
        assert palette[0] == [0, 0, 0]
        assert len({tuple(colour) for colour in palette}) == len(palette) == num_classes + 1
        assert all(0 <= value <= 255 for colour in palette for value in colour)
    assert class_names(3) == ('background', 'plain disc', 'striped star', 'dotted square')
    assert class_names(60)[:7] == class_names(6)


@pytest.mark.parametrize('label', [0, -1, 201])
def test_no_class_beyond_the_last(label: int) -> None:
    with pytest.raises(ValueError, match=r'1\.\.200'):
        shape_class(label)


# --- files ----------------------------------------------------------------------------------------


def test_files_are_the_scenes(tmp_path: Path) -> None:
    dataset = build(tmp_path, split='val')
    for index, info in enumerate(dataset.load_data_list()):
        image, mask = draw_scene(index, split='val', image_size=32)
        np.testing.assert_array_equal(cv2.imread(info['img_path']), image)
        read = cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(read, mask)


def test_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    monkeypatch.setattr(shapes, 'draw_scene', lambda *a, **k: pytest.fail('drawn again'))
    assert len(build(tmp_path)) == 4


def test_parameter_sets_side_by_side(tmp_path: Path) -> None:
    variants = [
        dict(), dict(split='val'), dict(num_classes=9), dict(image_size=40), dict(seed=1),
        dict(num_images=6), dict(classes_per_image=(2, 2)),
    ]  # fmt: skip
    datasets = [build(tmp_path, **variant) for variant in variants]
    assert len({dataset.data_root for dataset in datasets}) == len(variants)
    assert [len(dataset) for dataset in datasets] == [4, 4, 4, 4, 4, 6, 4]
    few, many = datasets[0], datasets[5]
    first = [cv2.imread(dataset.get_data_info(3)['img_path']) for dataset in (few, many)]
    np.testing.assert_array_equal(*first)


def test_a_failing_draw_leaves_nothing_behind(tmp_path: Path) -> None:
    def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 2:
            raise MemoryError('no more paper')
        return draw_scene(index, image_size=32)

    with pytest.raises(MemoryError, match='no more paper'):
        draw_split(tmp_path / 'train', 4, draw)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_whole_as_soon_as_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / 'train'

    def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
        assert not folder.exists()
        return draw_scene(index, image_size=32)

    draw_split(folder, 4, draw)
    check_split(folder, 4)
    assert os.listdir(tmp_path) == ['train']
    # Others than the owner may read it as far as the umask allows.
    assert folder.stat().st_mode == (tmp_path / 'train/images').stat().st_mode


def test_the_faster_process_wins(tmp_path: Path) -> None:
    folder = tmp_path / 'train'

    def slow(index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 3:
            draw_split(folder, 4, lambda i: draw_scene(i, image_size=32, seed=1))
        return draw_scene(index, image_size=32, seed=2)

    draw_split(folder, 4, slow)
    winner, _ = draw_scene(0, image_size=32, seed=1)
    np.testing.assert_array_equal(cv2.imread(str(folder / 'images/00000.png')), winner)
    assert os.listdir(tmp_path) == ['train']


def test_many_at_once(tmp_path: Path) -> None:
    sizes: list[int] = []
    threads = [
        threading.Thread(target=lambda: sizes.append(len(build(tmp_path)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [4] * 4


@pytest.mark.parametrize('part', ['images', 'masks'])
def test_a_lost_file_is_named(tmp_path: Path, part: str) -> None:
    folder = Path(build(tmp_path).data_root)
    (folder / part / '00001.png').unlink()
    with pytest.raises(FileNotFoundError, match=f'{part}.*1 are missing.*drawn anew'):
        build(tmp_path)


@pytest.mark.parametrize('part', ['images', 'masks'])
def test_a_file_too_many_is_refused(tmp_path: Path, part: str) -> None:
    folder = Path(build(tmp_path).data_root)
    (folder / part / 'holiday.png').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match='1 do not belong'):
        build(tmp_path)


def test_rank_0_draws_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def rank_0_at_work() -> None:
        events.append('barrier')
        options = dict(num_images=4, image_size=32)
        monkeypatch.setattr(shapes, 'barrier', lambda: None)
        monkeypatch.setattr(shapes, 'is_main_process', lambda: True)
        ShapesDataset(data_root=str(tmp_path), **options)

    def draw(*args) -> None:
        events.append('draw')
        draw_split(*args)

    monkeypatch.setattr(shapes, 'is_main_process', lambda: False)
    monkeypatch.setattr(shapes, 'barrier', rank_0_at_work)
    monkeypatch.setattr(shapes, 'draw_split', draw)
    assert len(build(tmp_path)) == 4
    assert events == ['barrier', 'draw']


def test_the_barrier_is_reached_when_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[bool] = []
    monkeypatch.setattr(shapes, 'barrier', lambda: reached.append(True))
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(OSError, match='file'):
        build(tmp_path / 'file')
    assert reached == [True]


# --- as an mmseg data set -------------------------------------------------------------------------


def test_works_as_an_mmseg_dataset(tmp_path: Path) -> None:
    config = dict(
        type='ShapesDataset', _scope_='mmseg', data_root=str(tmp_path), num_classes=3, num_images=5,
        image_size=64, pipeline=PIPELINE, test_mode=True,
    )  # fmt: skip
    dataset = DATASETS.build(config)
    assert len(dataset) == 5
    assert dataset.metainfo['classes'] == class_names(3)
    assert dataset.metainfo['palette'] == class_palette(3)
    assert dataset.metainfo['label_map'] is None
    for index in range(5):
        sample = dataset[index]
        image, mask = draw_scene(index, num_classes=3, image_size=64)
        np.testing.assert_array_equal(sample['inputs'].numpy(), image.transpose(2, 0, 1))
        label = sample['data_samples'].gt_sem_seg.data
        np.testing.assert_array_equal(label[0].numpy(), mask)


def test_two_instances_keep_their_own_classes(tmp_path: Path) -> None:
    three, nine = build(tmp_path, num_classes=3), build(tmp_path, num_classes=9)
    assert (len(three.metainfo['classes']), len(nine.metainfo['classes'])) == (4, 10)
    assert three.metainfo['label_map'] is None
    assert nine.metainfo['label_map'] is None


def test_lazy_init_draws_nothing(tmp_path: Path) -> None:
    dataset = build(tmp_path, lazy_init=True)
    assert dataset.metainfo['classes'] == class_names(6)
    assert list(tmp_path.iterdir()) == []
    dataset.full_init()
    assert len(dataset) == 4


def test_indices(tmp_path: Path) -> None:
    dataset = build(tmp_path, indices=[3, 1])
    names = [Path(dataset.get_data_info(i)['img_path']).name for i in range(len(dataset))]
    assert names == ['00003.png', '00001.png']


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('num_classes', 0), ('num_classes', 201), ('num_classes', 2.0), ('num_classes', True),
        ('num_images', 0), ('image_size', 8), ('seed', -1), ('split', 'test'),
        ('classes_per_image', (0, 3)), ('classes_per_image', (3, 2)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        build(tmp_path, **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_misspelt_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match='num_class'):
        build(tmp_path, num_class=3)
