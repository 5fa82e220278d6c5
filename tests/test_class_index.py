# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The class index: what it reads, what it keeps, and the image counts of the published splits."""

import csv
import os
import weakref

import numpy as np
import pytest
import torch.multiprocessing as mp
from PIL import Image

from mmseg_sats.datasets.class_index import index as module
from mmseg_sats.datasets.class_index import mask_scan
from mmseg_sats.datasets.class_index.index import ClassIndex, select_eval, select_train
from mmseg_sats.datasets.class_index.mask_scan import labels_of
from mmseg_sats.protocol import Protocol
from tests.shared import shared_path

LABELS = [[0, 1], [2], [0, 255], [3, 7, 255], [0]]


def write_mask(path, labels):
    row = np.array(labels, dtype=np.uint8)
    Image.fromarray(np.stack([row, row[::-1]])).save(path)
    return str(path)


@pytest.fixture
def masks(tmp_path):
    folder = tmp_path / 'masks' / 'a'
    folder.mkdir(parents=True)
    return [write_mask(folder / f'{i}.png', labels) for i, labels in enumerate(LABELS)]


@pytest.fixture
def warnings_(monkeypatch):
    seen = []
    monkeypatch.setattr(module, '_warn', seen.append)
    return seen


def held(index):
    return [np.flatnonzero(row).tolist() for row in index.presence]


def forbid_scan(monkeypatch):
    def scan(files, *_):
        raise AssertionError(f'scanned again: {files}')

    monkeypatch.setattr(module, 'scan_masks', scan)


def test_no_row_is_kept_while_masks_are_read(masks, monkeypatch):
    """Each would hold memory of the size of its mask, which is fragmented by then."""
    rows = []

    def counted(file, backend):
        assert sum(row() is not None for row in rows) <= 1
        row = mask_scan.np.packbits(labels_of(file, backend))
        rows.append(weakref.ref(row))
        return row

    monkeypatch.setattr(mask_scan, '_packed_labels', counted)
    packed = mask_scan.scan_masks(masks, workers=1)
    assert len(rows) == len(masks)
    assert [np.flatnonzero(np.unpackbits(row)).tolist() for row in packed] == LABELS


def test_scan(masks, tmp_path):
    index = ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    assert held(index) == LABELS
    assert (index.presence.shape, index.presence.dtype) == ((5, 256), bool)
    assert index.root == str(tmp_path / 'masks' / 'a')
    assert index.names == ['0.png', '1.png', '2.png', '3.png', '4.png']


def test_palette_and_one_bit_masks_count_by_index(tmp_path):
    palette = Image.fromarray(np.array([[0, 4], [255, 4]], np.uint8), mode='L')
    palette = palette.convert('P')
    palette.putdata([0, 4, 255, 4])
    palette.putpalette([200, 10, 10] * 256)
    palette.save(tmp_path / 'p.png')
    Image.fromarray(np.array([[True, False]])).save(tmp_path / 'b.png')
    files = [str(tmp_path / 'p.png'), str(tmp_path / 'b.png')]
    assert held(ClassIndex.load_or_scan(files, cache_dir=tmp_path)) == [[0, 4, 255], [0, 1]]


@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (9, 1), (40, 30)])
@pytest.mark.parametrize('block', [1, 5])
def test_the_labels_of_a_mask_are_those_of_all_its_pixels(tmp_path, shape, block):
    """Of noise and of areas; one pixel alone, in a corner too, is found."""
    rng = np.random.default_rng(block)
    for number in range(10):
        labels = rng.integers(256, size=shape, dtype=np.uint8)
        labels = labels.repeat(block, axis=0).repeat(block, axis=1)
        labels[rng.integers(-1, 1), rng.integers(-1, 1)] = number
        Image.fromarray(labels).save(tmp_path / 'm.png')
        np.testing.assert_array_equal(
            np.flatnonzero(labels_of(str(tmp_path / 'm.png'))), np.unique(labels)
        )


def test_processes_agree_with_one_process(tmp_path, monkeypatch):
    labels = [[i % 7, (i * i) % 11] for i in range(150)]
    files = [write_mask(tmp_path / f'{i}.png', row) for i, row in enumerate(labels)]
    alone = module.scan_masks(files, workers=1)
    monkeypatch.setattr(mask_scan, '_IN_PROCESS', 10)
    monkeypatch.setattr(mask_scan, '_SHOW_PROGRESS', 100)
    np.testing.assert_array_equal(module.scan_masks(files, workers=2), alone)
    assert held(ClassIndex(files, alone)) == [sorted(set(row)) for row in labels]
    (tmp_path / '140.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'140\.png is unreadable'):
        module.scan_masks(files, workers=2)


def test_nothing_changed_nothing_scanned(masks, tmp_path, monkeypatch):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    forbid_scan(monkeypatch)
    assert held(ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')) == LABELS
    with pytest.raises(AssertionError, match='scanned again'):
        ClassIndex.load_or_scan(masks[:2], cache_dir=tmp_path / 'cache')


def test_changed_files_alone_are_renewed(masks, tmp_path, monkeypatch):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    before = os.stat(masks[1])
    write_mask(masks[1], [5])
    os.utime(masks[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    scan, scanned = module.scan_masks, []
    monkeypatch.setattr(module, 'scan_masks', lambda f, *a: scanned.append(f) or scan(f, *a))
    index = ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    assert scanned == [[masks[1]]]
    assert held(index) == [[0, 1], [5], *LABELS[2:]]
    assert held(ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')) == held(index)
    assert len(scanned) == 1


def test_same_time_but_another_size_is_renewed(masks, tmp_path):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    before = os.stat(masks[0])
    write_mask(masks[0], list(range(60)))
    os.utime(masks[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    index = ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    assert held(index)[0] == list(range(60))


def test_environment_names_the_cache(masks, tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_SATS_CACHE', str(tmp_path / 'elsewhere'))
    ClassIndex.load_or_scan(masks)
    (file,) = (tmp_path / 'elsewhere').iterdir()
    assert file.suffix == '.npz'
    with np.load(file, allow_pickle=False) as data:
        assert {name: data[name].shape for name in data} == {'stamps': (5, 2), 'packed': (5, 32)}


def test_relative_and_absolute_paths_share_a_cache(masks, tmp_path, monkeypatch):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    forbid_scan(monkeypatch)
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(file, tmp_path) for file in masks]
    assert held(ClassIndex.load_or_scan(relative, cache_dir='cache')) == LABELS


def test_what_one_reader_found_is_not_taken_for_anothers(masks, tmp_path):
    files = {module._cache_file(masks, tmp_path, backend) for backend in ('pillow', 'cv2')}
    assert len(files) == 2


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    # A byte of the packed bits, which lie uncompressed at the end: the checksum must notice.
    place = content.rindex(b'PK\x01\x02', 0, content.rindex(b'PK\x01\x02')) - 8
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize('damage', [cut, flip, lambda _: b'', lambda _: b'\x93NUMPY rubbish'])
def test_damaged_cache_is_renewed(masks, tmp_path, warnings_, damage, monkeypatch):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    (file,) = (tmp_path / 'cache').iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert held(ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')) == LABELS
    assert len(warnings_) == 1
    assert str(file) in warnings_[0]
    forbid_scan(monkeypatch)
    assert held(ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')) == LABELS


@pytest.mark.parametrize(
    'arrays',
    [
        {'stamps': np.zeros((5, 2), np.int64)},
        {'stamps': np.zeros((4, 2), np.int64), 'packed': np.zeros((5, 32), np.uint8)},
        {'stamps': np.zeros((5, 2), np.int64), 'packed': np.array([{}] * 5)},
    ],
)
def test_cache_with_the_wrong_content_is_renewed(masks, tmp_path, warnings_, arrays):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    (file,) = (tmp_path / 'cache').iterdir()
    np.savez(file, **arrays)
    assert held(ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')) == LABELS
    assert 'is unreadable' in warnings_[0]


def test_cache_that_cannot_be_written(masks, tmp_path, warnings_):
    (tmp_path / 'file').write_text('in the way')
    index = ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'file' / 'cache')
    assert held(index) == LABELS
    assert 'cannot be written' in warnings_[0]


def test_failed_write_leaves_no_rubbish(masks, tmp_path, warnings_, monkeypatch):
    def full_disk(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(module.os, 'replace', full_disk)
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    assert 'No space left' in warnings_[0]
    assert list((tmp_path / 'cache').iterdir()) == []


@pytest.mark.parametrize(
    ('array', 'found'),
    [
        (np.zeros((2, 3, 3), np.uint8), r'shape \(2, 3, 3\) of uint8'),
        (np.zeros((2, 3), np.uint16), r'shape \(2, 3\) of uint16'),
    ],
)
def test_mask_of_the_wrong_kind(tmp_path, array, found):
    file = tmp_path / 'wrong.png'
    Image.fromarray(array).save(file)
    with pytest.raises(ValueError, match=rf'wrong\.png.*single-channel 8-bit.*found {found}'):
        ClassIndex.load_or_scan([str(file)], cache_dir=tmp_path)


def test_mask_that_is_cut_off(tmp_path):
    file = tmp_path / 'cut.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (60, 60), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(ValueError, match=r'cut\.png is unreadable .*single-channel 8-bit'):
        ClassIndex.load_or_scan([str(file)], cache_dir=tmp_path)


def test_missing_mask_is_named_even_with_a_cache(masks, tmp_path):
    ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    os.remove(masks[3])
    with pytest.raises(FileNotFoundError, match=r'a/3\.png does not exist \(4 of 5'):
        ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')


def test_check_labels(masks, tmp_path):
    index = ClassIndex.load_or_scan(masks, cache_dir=tmp_path / 'cache')
    index.check_labels(num_classes=7)
    message = r'a/3\.png holds label 7 .*0 \(background\), 1 to 6 and 255 .*1 of 5 masks'
    with pytest.raises(ValueError, match=message):
        index.check_labels(num_classes=6)
    with pytest.raises(ValueError, match=r'a/2\.png holds label 255'):
        index.check_labels(num_classes=6, ignore_index=7)


def test_selection_by_hand():
    # Column = label; the classes are 1, 2 and 3; 255 and background must not matter.
    presence = np.zeros((7, 256), bool)
    for row, labels in enumerate([[0], [1], [0, 2], [1, 2], [2, 3], [3, 255], [0, 255]]):
        presence[row, labels] = True
    first, second, third = Protocol('1-1', num_classes=3).stages
    assert select_train(presence, first, 'overlapped').tolist() == [1, 3]
    assert select_train(presence, first, 'disjoint').tolist() == [1]
    assert select_train(presence, second, 'overlapped').tolist() == [2, 3, 4]
    assert select_train(presence, second, 'disjoint').tolist() == [2, 3]
    assert select_train(presence, second, 'sequential').tolist() == [2, 3]
    assert select_train(presence, third, 'disjoint').tolist() == [4, 5]
    assert select_eval(presence, second).tolist() == [1, 2, 3, 4]
    assert select_eval(presence, second, 'all').tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert select_train(presence, second).dtype == np.int64


def test_selection_refuses_what_it_does_not_know():
    stage = Protocol('1-1', num_classes=3).stages[0]
    presence = np.zeros((2, 4), bool)
    with pytest.raises(ValueError, match=r"setting='overlaped'.*mean 'overlapped'"):
        select_train(presence, stage, 'overlaped')
    with pytest.raises(ValueError, match=r"eval_images='sen'.*mean 'seen'"):
        select_eval(presence, stage, 'sen')
    with pytest.raises(ValueError, match='labels 0 to 2, the stage names class 3'):
        select_train(presence[:, :3], stage, 'disjoint')
    with pytest.raises(ValueError, match='bool'):
        select_train(presence.astype(np.uint8), stage)


def test_published_numbers_of_images():
    facts = np.load(shared_path('facts/voc12aug_class_presence.npz'), allow_pickle=False)
    with open(shared_path('paper/split_counts.csv'), newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['dataset'].startswith('voc')]
    assert len(rows) == 11
    for row in rows:
        stages = Protocol(row['protocol'], num_classes=20).stages
        if row['split'] == 'train':
            picked = [select_train(facts['train'], s, row['setting']) for s in stages]
        else:
            picked = [select_eval(facts['val'], s, 'seen') for s in stages]
        assert ' '.join(str(len(p)) for p in picked) == row['images per stage'], row


def read_on_one_rank(rank, files, cache_dir, port, results):
    import torch.distributed as torch_dist

    torch_dist.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2
    )
    if rank == 1:
        module.scan_masks = None  # rank 1 must not need it
    try:
        results.put((rank, held(ClassIndex.load_or_scan(files, cache_dir=cache_dir))))
    except FileNotFoundError as error:
        results.put((rank, str(error)))
    torch_dist.destroy_process_group()


def two_ranks(files, cache_dir, port):
    context = mp.get_context('fork')
    results = context.Queue()
    ranks = [
        context.Process(target=read_on_one_rank, args=(r, files, cache_dir, port, results))
        for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    answers = dict(results.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=300)
    return answers


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def test_rank_0_reads_for_all(masks, tmp_path):
    cache = str(tmp_path / 'cache')
    assert two_ranks(masks, cache, free_port()) == {0: LABELS, 1: LABELS}


def test_error_of_rank_0_reaches_all(masks, tmp_path):
    os.remove(masks[3])
    answers = two_ranks(masks, str(tmp_path / 'cache'), free_port())
    assert 'a/3.png does not exist' in answers[0]
    assert answers[0] == answers[1]
