# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""FolderDataset, and masks that number their classes in their own way."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmseg.registry import DATASETS

from mmseg_sats.datasets import FolderDataset, IncrementalDataset
from mmseg_sats.datasets.class_index.index import ClassIndex, index_by_class
from mmseg_sats.datasets.folder import BLACK, IGNORED_COLOUR, distinct_colours, label_ids
from mmseg_sats.datasets.incremental_dataset import NoImagesError
from mmseg_sats.datasets.transforms import relabel_table, through_label_ids
from mmseg_sats.protocol import Protocol

CLASSES = ('background', 'road', 'car', 'crate', 'pallet')
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


def write(root: Path, name: str, numbers: list[int] | None) -> None:
    path = root / 'images' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.jpg', np.full((4, 6, 3), 9, np.uint8))[1])
    if numbers is not None:
        mask = root / 'masks' / Path(name).with_suffix('.png')
        mask.parent.mkdir(parents=True, exist_ok=True)
        array = np.zeros((4, 6), np.uint8)
        array[0, : len(numbers)] = numbers
        cv2.imwrite(str(mask), array)


def folder(root: Path, **options: Any) -> FolderDataset:
    return DATASETS.build(
        dict(type='FolderDataset', classes=CLASSES, data_root=str(root), pipeline=[]) | options
    )


def stage_1(root: Path, setting: str = 'overlapped', **options: Any) -> IncrementalDataset:
    """Road and car are old, crate and pallet new."""
    wrapped = dict(type='FolderDataset', classes=CLASSES, data_root=str(root), pipeline=LOAD) | options
    return IncrementalDataset(wrapped, '2-2', 1, setting=setting)


def test_images_of_any_kind_find_their_masks(tmp_path: Path) -> None:
    for name in ('b.JPG', 'a.png', 'sub/c.jpeg'):
        write(tmp_path, name, [1])
    (tmp_path / 'images/notes.txt').write_text('no image')
    data = folder(tmp_path)
    found = [data.get_data_info(i) for i in range(len(data))]
    names = [Path(info['img_path']).relative_to(tmp_path / 'images').as_posix() for info in found]
    assert names == ['a.png', 'b.JPG', 'sub/c.jpeg']
    assert found[2]['seg_map_path'] == str(tmp_path / 'masks/sub/c.png')
    assert data.metainfo['classes'] == CLASSES
    assert len(data.metainfo['palette']) == len(CLASSES)
    (tmp_path / 'list.txt').write_text('sub/c\n\n')
    assert len(folder(tmp_path, ann_file='list.txt')) == 1


def test_several_folders_are_one_data_set(tmp_path: Path) -> None:
    """Names may repeat in them: each image keeps the mask of its own folder, and its name in a memory."""
    write(tmp_path, 'a.jpg', [3])
    write(tmp_path / 'old', 'a.jpg', [1])
    write(tmp_path / 'old', 'b.jpg', [2])
    more = [('old/images', 'old/masks')]
    data = stage_1(tmp_path, 'sequential', more_folders=more)
    assert data.image_files() == ['a.jpg']
    rows = data.dataset.load_data_list()
    assert [Path(row['seg_map_path']).relative_to(tmp_path).as_posix() for row in rows] == [
        'masks/a.png', 'old/masks/a.png', 'old/masks/b.png'
    ]
    before = IncrementalDataset(data.dataset, '2-2', 0, pipeline=LOAD)
    assert before.image_files() == ['../old/images/a.jpg', '../old/images/b.jpg']
    (tmp_path / 'old/masks/b.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 3 images in .*images and .*old/images .*b\.png'):
        folder(tmp_path, more_folders=more)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'folder of images .*images does not exist'):
        folder(tmp_path)
    for index in range(8):
        write(tmp_path, f'{index}.jpg', [1] if index == 0 else None)
    with pytest.raises(FileNotFoundError, match=r'7 of 8 images .*1\.png.*5\.png and 2 more'):
        folder(tmp_path)
    (tmp_path / 'list.txt').write_text('0\nnine\n')
    with pytest.raises(FileNotFoundError, match='names 1 images that are not there: nine'):
        folder(tmp_path, ann_file='list.txt')
    write(tmp_path, '0.png', [1])
    with pytest.raises(ValueError, match=r'0\.jpg and .*0\.png would share a mask'):
        folder(tmp_path)


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('road', 'car'), r"are 'background' and then a name .* got \['road', 'car'\]"),
        (('background', 'car', 'car'), r"got \['car'\] twice"),
        ((), 'all different; got'),
    ],
)
def test_impossible_names_are_refused(classes: tuple, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, classes=classes)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (dict(crat=3), r"names 'crat', which is no class \(did you mean 'crate'\?\)"),
        (dict(crate=256), r"mask_values\['crate'\] is 256"),
        (dict(crate=True), r"mask_values\['crate'\] is True"),
        (dict(crate=7, pallet=7), "gives 7 to 'crate' and to 'pallet'"),
    ],
)
def test_impossible_numbers_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_ids(CLASSES, values)


def test_background_is_0_unless_that_is_a_class_or_named() -> None:
    assert label_ids(CLASSES, dict(crate=11)) == {11: 3, 0: 0}
    assert label_ids(CLASSES, dict(crate=0)) == {0: 3}
    assert label_ids(CLASSES, dict(crate=11, background=255)) == {11: 3, 255: 0}


def test_numbers_of_their_own_become_the_stage_s_labels(tmp_path: Path) -> None:
    write(tmp_path, 'new.jpg', [40, 11, 90, 255])
    write(tmp_path, 'old.jpg', [90])
    values = dict(crate=11, pallet=40, car=90)
    data = stage_1(tmp_path, mask_values=values)
    assert len(data) == 1
    assert np.flatnonzero(data.presence[0]).tolist() == [0, 2, 3, 4, 255]  # by class, not by number
    assert data.get_cat_ids(0) == [0, 3, 4]
    assert data[0]['gt_seg_map'][0].tolist() == [4, 3, 0, 255, 0, 0]  # car is old: background
    sequential = stage_1(tmp_path, setting='sequential', mask_values=values)
    assert sequential[0]['gt_seg_map'][0].tolist() == [4, 3, 2, 255, 0, 0]


def test_background_may_have_any_number(tmp_path: Path) -> None:
    write(tmp_path, 'a.jpg', [255, 0, 255])
    data = stage_1(tmp_path, mask_values=dict(crate=0, background=255))
    assert data[0]['gt_seg_map'][0].tolist() == [0, 3, 0, 3, 3, 3]


def test_a_number_that_stands_for_nothing_is_an_error_not_background(tmp_path: Path) -> None:
    write(tmp_path, 'a.jpg', [11, 3])  # 3 is crate's class id, but not its number
    with pytest.raises(ValueError, match=r'a\.png holds the numbers \[3\], which mask_values does not'):
        stage_1(tmp_path, mask_values=dict(crate=11))
    # Without mask_values every number is its class.
    assert stage_1(tmp_path / '.', mask_values={}, classes=[*CLASSES, *'abcdefgh'][:13])


def test_no_image_left_has_an_error_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, 'a.jpg', [1])
    with pytest.raises(NoImagesError, match='none of 1 images of FolderDataset is left for train'):
        stage_1(tmp_path)


def index_of(number: int) -> ClassIndex:
    """The index of one mask that holds one number."""
    presence = np.zeros((1, 256), bool)
    presence[0, number] = True
    return ClassIndex(['a.png'], np.packbits(presence, axis=1))


@pytest.mark.parametrize(
    ('number', 'ids', 'held'),
    [
        (10, {10: 1, 20: 1}, 1),  # two numbers that stand for one class: either will do
        (20, {10: 1, 20: 1}, 1),
        (255, {255: 2}, 2),  # the ignored number, if it stands for a class
    ],
)
def test_what_a_number_stands_for(number: int, ids: dict[int, int], held: int) -> None:
    presence = index_by_class(index_of(number), ids).presence
    assert np.flatnonzero(presence[0]).tolist() == [held]


def test_index_and_table_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    ids = {0: 0, 7: 2, 9: 1, 200: 4, 201: 3}
    presence = np.zeros((20, 256), bool)
    for number in (*ids, 255):
        presence[:, number] = rng.random(20) < 0.5
    index = ClassIndex([f'{i}.png' for i in range(20)], np.packbits(presence, axis=1))
    found = index_by_class(index, ids).presence
    for row in range(20):
        expected = {ids.get(int(number), 255) for number in np.flatnonzero(presence[row])}
        assert set(np.flatnonzero(found[row]).tolist()) == expected
    table = relabel_table(Protocol('2-2', 4), 1)
    through = through_label_ids(table, ids)
    for number in range(256):
        assert through[number] == (table[ids[number]] if number in ids else 255)
    assert through_label_ids(table, None) is table


def test_images_may_end_with_more_than_their_format(tmp_path: Path) -> None:
    for name in ('sub/a_rgb.jpg', 'b_rgb.jpg', 'c.jpg'):
        write(tmp_path, name, None)
    (tmp_path / 'masks/sub').mkdir(parents=True)
    for name in ('sub/a', 'b'):
        cv2.imwrite(str(tmp_path / f'masks/{name}_ids.png'), np.zeros((4, 6), np.uint8))
    data = folder(tmp_path, img_suffix='_rgb.jpg', seg_map_suffix='_ids.png')
    masks = [Path(data.get_data_info(i)['seg_map_path']).name for i in range(len(data))]
    assert masks == ['b_ids.png', 'a_ids.png']


def test_numbers_that_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, 'a.jpg', [3, 9, 255])
    data = stage_1(tmp_path, ignore_values=[0, 9])
    assert data[0]['gt_seg_map'][0].tolist() == [3, 255, 255, 255, 255, 255]
    named = stage_1(tmp_path, mask_values=dict(crate=9, background=3), ignore_values=[0])
    assert named[0]['gt_seg_map'][0].tolist() == [0, 3, 255, 255, 255, 255]
    with pytest.raises(ValueError, match='ignore_values=0: expected a list'):
        folder(tmp_path, ignore_values=0)
    for wrong, message in (([256], 'has 256'), ([9], "has 9, which is 'crate'")):
        with pytest.raises(ValueError, match=f'ignore_values {message}'):
            label_ids(CLASSES, dict(crate=9), wrong)


@pytest.mark.parametrize('count', [6, 21, 60])
def test_classes_have_colours_that_can_be_told_apart(count: int) -> None:
    colours = distinct_colours(count)
    assert colours[0] == BLACK
    assert colours == distinct_colours(count)
    assert colours[:6] == distinct_colours(6)
    lab = cv2.cvtColor(np.float32([[*colours, IGNORED_COLOUR]]) / 255, cv2.COLOR_RGB2Lab)[0]
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(count + 1, 1)].min()
    assert apart > {6: 60, 21: 30, 60: 15}[count]


def test_colours_beside_others() -> None:
    known = [(0, 0, 0), (102, 0, 255), (12, 34, 56)]
    colours = distinct_colours(5, beside=known)
    assert colours[:3] == known
    assert len(set(colours)) == 5
