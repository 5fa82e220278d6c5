# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""check_dataset: the counts, and every kind of fault at once."""

import csv
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import RUNNERS
from PIL import Image

from mmseg_sats.datasets.checks import image_sizes, whole_dataset
from mmseg_sats.datasets.checks.image_sizes import PairSizes, check_sizes
from mmseg_sats.datasets.checks.whole_dataset import examine, examine_pair, published_counts
from mmseg_sats.datasets.class_index.index import ClassIndex
from mmseg_sats.engine.checks import data
from mmseg_sats.engine.training.stage_work import _classes_without_images
from mmseg_sats.protocol import Protocol
from tests.in_process import call
from tests.shared import shared_path

CONFIG = """
_base_ = ['{configs}/_base_/own_data.py', '{configs}/sats/sats.py']
protocol = '1-1'
class_names = ['background', 'a', 'b', 'c']
mask_values = dict(a=10, b=20, c=30)
data_root = '{root}'
train_images, train_masks = 'rgb/train', 'labels/train'
val_images, val_masks = 'rgb/val', 'labels/val'
"""


def write(folder: Path, split: str, name: str, mask: np.ndarray | None, size: tuple = (8, 10)) -> None:
    for part in ('rgb', 'labels'):
        (folder / part / split).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / 'rgb' / split / f'{name}.jpg'), np.full((*size, 3), 90, np.uint8))
    if mask is not None:
        cv2.imwrite(str(folder / 'labels' / split / f'{name}.png'), mask)


def mask(*numbers: int) -> np.ndarray:
    """(8, 10) with eight pixels of each number, the rest 0."""
    array = np.zeros((8, 10), np.uint8)
    for column, number in enumerate(numbers):
        array[:, column] = number
    return array


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, numbers in (('one', (10, 20)), ('two', (20, 255)), ('three', (30, 10))):
        write(tmp_path, 'train', name, mask(*numbers))
    write(tmp_path, 'val', 'four', mask(10, 20, 30))
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(configs=Path(__file__).parents[1] / 'configs', root=tmp_path))
    return path


def check(config: Path) -> tuple[int, list[str]]:
    done = call('tools/check_dataset.py', str(config))
    assert 'Traceback' not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout.splitlines()


def row(lines: list[str], name: str, table: int) -> list[str]:
    """The cells of the row that starts with ``name`` in the first (0) or second (1) table."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if '|' in line]
    heads = [index for index, cells in enumerate(rows) if cells[0] in ('stage', 'class')]
    part = rows[heads[table] : heads[table + 1] if table == 0 else None]
    return next(cells for cells in part if cells[0] == name)


def test_a_clean_data_set_is_counted(config: Path) -> None:
    status, lines = check(config)
    assert status == 0
    assert lines[-1] == 'no fault found'
    assert row(lines, '1', 0)[2:] == ['2', '-', '1', '-']  # overlapped: images with b
    assert row(lines, 'a', 1) == ['a', '0', '2', '16', '1', '8']
    assert row(lines, 'b', 1) == ['b', '1', '2', '16', '1', '8']
    assert row(lines, 'c', 1) == ['c', '2', '1', '8', '1', '8']


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('kind', ['color', 'color_ignore_orientation', 'unchanged'])
def test_a_photograph_is_turned_as_it_is_loaded(suffix: str, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    picture = Image.fromarray(np.zeros((8, 10, 3), np.uint8))
    for name in 'ab':  # the first of a kind is loaded, the others are measured by their headers
        picture.save(tmp_path / f'{name}.{suffix}', **(dict(tiffinfo=exif) if suffix == 'tif' else dict(exif=exif)))
    for name, shape in (('turned', (10, 8)), ('lying', (8, 10))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f'{name}.png')
    sizes = PairSizes([LoadImageFromFile(color_type=kind)])
    for name in 'ab':
        image = str(tmp_path / f'{name}.{suffix}')
        right, wrong = ('turned', 'lying') if mmcv.imread(image, flag=kind).shape[0] == 10 else ('lying', 'turned')
        info = dict(img_path=image, seg_map_path=str(tmp_path / f'{right}.png'))
        assert examine_pair(info, sizes).fault is None
        fault = examine_pair(info | dict(seg_map_path=str(tmp_path / f'{wrong}.png')), sizes).fault
        assert f'{wrong}.png is ' in fault
        assert 'as it is loaded (its EXIF orientation is 6)' in fault


def test_what_pillow_does_not_read_is_loaded_as_the_pipeline_does(tmp_path: Path) -> None:
    np.save(tmp_path / 'a.npy', np.zeros((8, 10, 5), np.float32))
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(tmp_path / 'a.png')
    info = dict(img_path=str(tmp_path / 'a.npy'), seg_map_path=str(tmp_path / 'a.png'))
    assert examine_pair(info, PairSizes([LoadNpy()])).fault is None
    check_sizes([info], [LoadNpy()])
    (tmp_path / 'b.npy').write_bytes(b'no array')
    with pytest.raises(ValueError, match=r'b\.npy is no image that can be read: '):
        check_sizes([info | dict(img_path=str(tmp_path / 'b.npy'))], [LoadNpy()])


class LoadNpy:
    """A user's own loader."""

    def __call__(self, results: dict) -> dict:
        return results | dict(img=np.load(results['img_path'], allow_pickle=False))


def test_very_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / 'a.jpg')
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / 'a.png')
    info = dict(img_path=str(tmp_path / 'a.jpg'), seg_map_path=str(tmp_path / 'a.png'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    check_sizes([info], [LoadImageFromFile()], mask_backend='cv2')  # OpenCV reads it
    with pytest.raises(ValueError, match=r"mask .*a\.png is larger than Pillow decodes .*imdecode_backend='cv2'"):
        check_sizes([info], [LoadImageFromFile()])
    monkeypatch.setattr(image_sizes, '_PILLOW_LIMIT', 200)
    with pytest.raises(ValueError, match=r'a\.jpg is no image .*expected tiles of it; .*OPENCV_IO_MAX_IMAGE_PIXELS'):
        check_sizes([info], [LoadImageFromFile(imdecode_backend='pillow')], mask_backend='cv2')


def test_a_cache_that_may_not_be_entered_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(tmp_path / 'a.jpg')
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(tmp_path / 'a.png')
    info = dict(img_path=str(tmp_path / 'a.jpg'), seg_map_path=str(tmp_path / 'a.png'))
    stat, mkdir = os.stat, os.mkdir

    def refusing(function: Callable) -> Callable:
        def call(path: object, *args: object, **options: object) -> object:
            if str(path).startswith('/locked'):
                raise PermissionError(13, 'Permission denied', str(path))
            return function(path, *args, **options)

        return call

    monkeypatch.setattr(os, 'stat', refusing(stat))
    monkeypatch.setattr(os, 'mkdir', refusing(mkdir))
    monkeypatch.delenv('MMSEG_SATS_CACHE')
    monkeypatch.setenv('HOME', '/locked/home')
    check_sizes([info], [LoadImageFromFile()])
    assert ClassIndex.load_or_scan([info['seg_map_path']]).presence[0, 0]


def test_every_fault_is_listed_not_the_first_alone(config: Path, tmp_path: Path) -> None:
    write(tmp_path, 'train', 'no_mask', None)
    write(tmp_path, 'train', 'other_size', mask(10), size=(8, 12))
    write(tmp_path, 'train', 'colours', np.full((8, 10, 3), 30, np.uint8))
    write(tmp_path, 'train', 'sixteen', np.full((8, 10), 20, np.uint16))
    write(tmp_path, 'train', 'unknown', mask(10, 77, 78))
    write(tmp_path, 'train', 'cut', mask(10))
    whole = (tmp_path / 'labels/train/cut.png').read_bytes()
    (tmp_path / 'labels/train/cut.png').write_bytes(whole[:40])
    write(tmp_path, 'train', 'no_image', mask(10))
    (tmp_path / 'rgb/train/no_image.jpg').write_text('no image')
    (tmp_path / 'labels/train/three.png').unlink()  # the only one with c
    write(tmp_path, 'val', 'four', mask(10, 20))
    status, lines = check(config)
    assert status == 1
    wrong = '\n'.join(line for line in lines if line.startswith('wrong: '))
    for words in (
        'no_mask.png does not exist',
        'three.png does not exist',
        'other_size.png is 10 x 8 pixels',
        'colours.png: expected a single-channel 8-bit label image (PNG of mode L or P), found shape',
        'sixteen.png: expected a single-channel 8-bit',
        'unknown.png holds the numbers [77, 78], which stand for no class',
        'cut.png is unreadable',
        'no_image.jpg is no image that can be read',
        'no image of stage 2 shows c',
    ):
        assert words in wrong, wrong
    assert lines[-1] == '9 faults'
    assert 'note: val: no image shows c, its IoU will say nothing' in lines
    assert row(lines, 'a', 1)[2] == '1'  # what is sound is counted all the same


def test_a_list_that_is_not_there_and_shared_images(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text().replace('rgb/val', 'rgb/train').replace('labels/val', 'labels/train'))
    status, lines = check(config)
    assert status == 1
    assert any('3 images are in train and in val' in line for line in lines)
    config.write_text(config.read_text().replace('rgb/train', 'rgb/nowhere'))
    status, lines = check(config)
    assert status == 1
    assert any('rgb/nowhere does not exist' in line for line in lines)


def test_workers_find_the_same(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmseg_sats.datasets.class_index import mask_scan

    infos = [
        dict(img_path=str(path), seg_map_path=str(tmp_path / 'labels/train' / f'{path.stem}.png'))
        for path in sorted((tmp_path / 'rgb/train').iterdir())
    ]
    infos.append(infos[0] | dict(seg_map_path='nowhere.png'))
    sizes = PairSizes([LoadImageFromFile()])
    one = examine(infos, sizes, 3, {0: 0, 10: 1, 20: 2, 30: 3}, workers=1)
    monkeypatch.setattr(mask_scan, '_IN_PROCESS', 0)
    two = examine(infos, sizes, 3, {0: 0, 10: 1, 20: 2, 30: 3}, workers=2)
    assert (one.images, one.faults) == (two.images, two.faults)
    assert one.faults == ['mask nowhere.png does not exist']
    np.testing.assert_array_equal(one.counts, two.counts)
    assert one.counts.sum(axis=1).tolist() == [80, 80, 80]


def test_published_counts() -> None:
    protocol = Protocol('15-1', 20)
    images, source = published_counts('voc', protocol, 'train', 'overlapped')
    assert images == [9568, 487, 299, 491, 500, 548]
    assert '10582' in source
    assert published_counts('voc', protocol, 'val')[0][-1] == 1449
    assert published_counts('voc_mini', protocol, 'val') is None
    turned = Protocol('15-1', 20, class_order=[*range(20, 0, -1)])
    assert published_counts('voc', turned, 'train', 'overlapped') is None


def test_published_counts_are_the_given_ones() -> None:
    names = {'voc12aug': 'voc', 'voc12': 'voc', 'ade20k': 'ade20k'}
    classes = {'voc': 20, 'ade20k': 150}
    with shared_path('paper/split_counts.csv').open() as file:
        for line in csv.DictReader(file):
            dataset, split = names[line['dataset']], line['split'].split()[0]
            protocol = Protocol(line['protocol'], classes[dataset])
            images, _ = published_counts(dataset, protocol, split, line['setting'])
            assert ' '.join(map(str, images)) == line['images per stage']


def test_a_photograph_that_is_cut_off_is_a_fault(config: Path, tmp_path: Path) -> None:
    write(tmp_path, 'train', 'half', mask(10), size=(80, 100))
    Image.fromarray(np.zeros((80, 100), np.uint8) + 10).save(tmp_path / 'labels/train/half.png')
    path = tmp_path / 'rgb/train/half.jpg'
    noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    status, lines = check(config)
    assert status == 1
    assert any('half.jpg is cut off or damaged' in line for line in lines)


STREET = """
_base_ = ['{configs}/_base_/segformer_tiny_shapes.py', '{configs}/sats/sats.py']
protocol = '1-1'
train_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='{root}', ann_file='list.txt', img_suffix='.jpg',
    data_prefix=dict(img_path='rgb/train', seg_map_path='labels/train'), metainfo=dict(classes=['road', 'a', 'b']),
    pipeline='$train_pipeline')
eval_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='{root}', img_suffix='.jpg',
    data_prefix=dict(img_path='rgb/val', seg_map_path='labels/val'), metainfo=dict(classes=['road', 'a', 'b']),
    pipeline='$eval_pipeline')
"""


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Three classes and no background; a list that repeats an image."""
    for name, numbers in (('one', (1, 255)), ('two', (2, 255))):
        write(tmp_path, 'train', name, mask(*numbers))
    write(tmp_path, 'val', 'four', mask(1, 2))
    (tmp_path / 'list.txt').write_text('one\ntwo\none\n')
    path = tmp_path / 'config.py'
    path.write_text(STREET.format(configs=Path(__file__).parents[1] / 'configs', root=tmp_path))
    return path


def test_check_refuses_what_the_run_refuses(street: Path, tmp_path: Path) -> None:
    status, lines = check(street)
    assert status == 1
    assert any("wrong: train: BaseSegDataset: is label 0 background or 'road'" in line for line in lines)
    elsewhere = tmp_path / 'elsewhere'
    (tmp_path / 'labels').rename(elsewhere)
    text = street.read_text().replace("seg_map_path='labels", f"seg_map_path='{elsewhere}")
    text = text.replace(f"data_root='{tmp_path}'", f"data_root='{tmp_path / 'data'}'")
    street.write_text(text + 'no_background = True\n')
    (tmp_path / 'data').mkdir()
    for name in ('rgb', 'list.txt'):
        (tmp_path / name).rename(tmp_path / 'data' / name)
    status, lines = check(street)
    assert [line for line in lines if 'leaves the data root' in line]
    street.write_text(street.read_text() + f"mask_root = '{elsewhere}'\n")
    assert check(street)[0] == 0


def test_labels_as_they_are_read_and_what_is_missing(street: Path) -> None:
    street.write_text(street.read_text() + 'no_background = True\n')
    status, lines = check(street)
    assert status == 0
    assert lines[:2] == [
        'labels: number in the masks, class > channel (images of the stage that show it: train / val)',
        '  images: 2 in train / 1 in val; background is what is not seen yet > 0 (0 / 0); ignored: 255 (2 / 0)',
    ]
    assert lines[2:5] == ['  stage 0: 0 road > 1 (2 / 1)', '  stage 1: 1 a > 2 (1 / 1)', '  stage 2: 2 b > 3 (1 / 1)']
    assert row(lines, 'background', 1) == ['background', '-', '0', '0', '0', '0']
    assert row(lines, '(ignored)', 1) == ['(ignored)', '-', '2', '16', '0', '0']
    assert row(lines, 'road', 1) == ['road', '0', '2', '128', '1', '64']
    notes = [line for line in lines if line.startswith('note: ')]
    assert any('train: 1 entries repeat an image that is listed before, such as' in note for note in notes)
    assert any('val: no image shows background: once all classes are learned' in note for note in notes)


def test_a_run_begins_with_its_labels(street: Path) -> None:
    street.write_text(street.read_text() + 'no_background = True\n')
    (street.parent / 'list.txt').write_text('one\none\ntwo\n')
    write(street.parent, 'train', 'two', mask(1))  # b is in no training image
    cfg = Config.fromfile(street)
    cfg.merge_from_dict(dict(protocol='1-2', work_dir=str(street.parent / 'run'), num_workers=0, crop_size=64))
    records: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'print_log', lambda message, **_: records.append(message))
        runner = RUNNERS.build(cfg)
    stages = [runner._work.config(stage) for stage in runner.protocol.stages]
    assert [_classes_without_images(stage) for stage in stages] == [[], ['b']]  # as results.json has it
    told = '\n'.join(records)
    assert '  stage 1: 1 a > 2 (2 / 1), 2 b > 3 (0 / 1)' in told
    assert 'train: no image of stage 1 shows b: it cannot be learned' in told
    assert 'train: 1 entries repeat an image' in told


def test_no_count_is_kept_while_pairs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would keep the memory of the images decoded around it from being used again."""
    counts: list[weakref.ref] = []

    def counted(info: dict[str, str], sizes: object) -> whole_dataset.Pair:
        assert sum(count() is not None for count in counts) <= 1
        numbers = np.bincount([len(counts)], minlength=256)
        counts.append(weakref.ref(numbers))
        return whole_dataset.Pair(numbers, None)

    monkeypatch.setattr(whole_dataset, 'examine_pair', counted)
    infos = [dict(img_path=f'{name}.jpg', seg_map_path=f'{name}.png') for name in 'abcd']
    found = examine(infos, None, num_classes=2, workers=1)
    assert found.images == ['a.jpg', 'b.jpg', 'c.jpg']
    assert found.counts.argmax(1).tolist() == [0, 1, 2]
    assert 'd.png holds the numbers [3]' in found.faults[0]
