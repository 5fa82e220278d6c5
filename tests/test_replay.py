# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Exemplars read back, the data they are mixed into, and the batches, on label maps by hand."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.dataset import DefaultSampler
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_sats.datasets import (
    IncrementalDataset,
    ReplayBatchSampler,
    ReplayDataset,
)
from mmseg_sats.datasets.memory import shared_batches
from mmseg_sats.datasets.memory.exemplars import (
    Exemplar,
    Exemplars,
    read_exemplars,
    write_exemplars,
)
from mmseg_sats.datasets.memory.replay_sampler import batch_split, endless_draw

MAPS = {
    'a': ([0, 1], [1, 1]),
    'b': ([0, 2], [255, 2]),
    'c': ([1, 2], [3, 255]),
    'd': ([0, 3], [3, 0]),
    'e': ([1, 3], [0, 4]),
    'f': ([3, 3], [4, 0]),
    'g': ([0, 0], [0, 3]),
    'h': ([0, 4], [0, 0]),
}
CLASSES = ('background', 'ant', 'bee', 'cat', 'dog')
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]


@pytest.fixture(autouse=True)
def mmseg_scope() -> None:
    init_default_scope('mmseg')


@pytest.fixture
def wrapped(tmp_path: Path) -> dict[str, Any]:
    for folder in ('img', 'ann'):
        (tmp_path / folder).mkdir()
    for name, rows in MAPS.items():
        Image.fromarray(np.array(rows, np.uint8)).save(tmp_path / 'ann' / f'{name}.png')
        Image.fromarray(np.full((2, 2, 3), ord(name), np.uint8)).save(tmp_path / 'img' / f'{name}.jpg')
    return dict(
        type='BaseSegDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=dict(classes=CLASSES, palette=[[i, 0, 0] for i in range(5)]),
        pipeline=PIPELINE,
        serialize_data=False,
    )


@pytest.fixture
def stage_1(wrapped: dict[str, Any]) -> dict[str, Any]:
    """Protocol 2-1: cat (3) is new, ant and bee are old, dog is future. Images c, d, e, f, g."""
    return dict(type='IncrementalDataset', dataset=wrapped, protocol='2-1', stage=1)


def memory_of(*names: str, size: int | None = None, holds: tuple[str, ...] = ('ant',)) -> Exemplars:
    items = tuple(Exemplar(name, holds[0], holds) for name in names)
    return Exemplars(0, 'ClassBalancedMemory', len(names) if size is None else size, 0, 8, items)


@pytest.fixture
def exemplars(tmp_path: Path) -> str:
    """What stage 0 kept: c is an image of stage 1 too."""
    write_exemplars(tmp_path / 'exemplars.json', memory_of('c.jpg', 'a.jpg'))
    return str(tmp_path / 'exemplars.json')


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / 'web/deeper').mkdir(parents=True)
    for name in ('x.png', 'deeper/y.JPG', 'deeper/z.jpeg'):
        Image.fromarray(np.full((2, 2, 3), 200, np.uint8)).save(tmp_path / 'web' / name)
    (tmp_path / 'web/list.txt').write_text('no image')
    folder = dict(type='ImageFolder', root=str(tmp_path / 'web'))
    return dict(type='OutsideDataset', dataset=folder, pipeline=PIPELINE)


def rows(data: dict[str, Any]) -> tuple[list[int], ...]:
    return tuple(data['data_samples'].gt_sem_seg.data[0].tolist())


# The file


def test_the_file_is_read_back_as_written(tmp_path: Path) -> None:
    memory = memory_of('deep/a.jpg', 'b.jpg', size=5, holds=('ant', 'bee'))
    write_exemplars(tmp_path / 'exemplars.json', memory)
    assert read_exemplars(tmp_path / 'exemplars.json', 5) == memory
    content = json.loads((tmp_path / 'exemplars.json').read_text())
    assert content['exemplars'][0] == dict(image='deep/a.jpg', stands_for='ant', holds=['ant', 'bee'])
    assert (content['size'], content['seed'], content['selection']) == (5, 0, 'ClassBalancedMemory')


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'stage_3/exemplars.json: no such memory'):
        read_exemplars(tmp_path / 'stage_3/exemplars.json')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"format": ', 'no file of exemplars'),
        ('[1, 2]', 'no file of exemplars'),
        (
            '{"format": "mmseg_sats exemplars 1", "stage": 0, "selection": "x", "size": 1, "seed": 0, "offered": 1, '
            '"exemplars": [{"image": "a.jpg", "stands_for": "cow", "holds": ["cat"]}]}',
            r"a.jpg stands for 'cow' but holds \['cat'\]",
        ),
        (
            '{"format": "mmseg_sats exemplars 1", "stage": 0, "selection": "x", "size": -1, "seed": 0, "offered": 1, '
            '"exemplars": []}',
            'size=-1, expected a whole number',
        ),
        ('{"format": "something else"}', "format 'something else', expected 'mmseg_sats exemplars 1'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / 'exemplars.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_exemplars(tmp_path / 'exemplars.json')


def test_over_budget_twice_and_another_budget_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'exemplars.json'
    write_exemplars(path, memory_of('a.jpg', 'b.jpg', size=1))
    with pytest.raises(ValueError, match='over budget: 2 exemplars, its size is 1'):
        read_exemplars(path)
    write_exemplars(path, memory_of('a.jpg', 'a.jpg'))
    with pytest.raises(ValueError, match=r"images twice: \['a.jpg'\]"):
        read_exemplars(path)
    write_exemplars(path, memory_of('a.jpg', size=40))
    with pytest.raises(ValueError, match='budget of 40, the config has memory=100'):
        read_exemplars(path, 100)


def test_a_memory_of_another_data_set_is_refused(tmp_path: Path, stage_1: dict[str, Any]) -> None:
    path = tmp_path / 'exemplars.json'
    cfg = dict(stage_1, mode='memory', exemplars=str(path))
    write_exemplars(path, memory_of('a.jpg', 'aa.jpg'))
    with pytest.raises(ValueError, match=r"1 of 2 images .* first is 'aa.jpg' \(did you mean 'a.jpg'"):
        DATASETS.build(cfg)
    write_exemplars(path, memory_of('a.jpg', holds=('aunt',)))
    with pytest.raises(ValueError, match=r"another data set.* no class 'aunt' \(did you mean 'ant'"):
        DATASETS.build(cfg)


# Labels


def test_exemplars_keep_the_true_labels_of_all_seen_classes(
    stage_1: dict[str, Any], exemplars: str
) -> None:
    dataset = DATASETS.build(dict(stage_1, mode='memory', exemplars=exemplars))
    assert dataset.image_names() == ['c', 'a']
    assert dataset.image_files() == ['c.jpg', 'a.jpg']
    assert [rows(dataset[i]) for i in range(2)] == [([1, 2], [3, 255]), ([0, 1], [1, 1])]
    stage_0 = DATASETS.build(dict(stage_1, stage=0, mode='memory', exemplars=exemplars))
    assert rows(stage_0[0]) == ([1, 2], [0, 255])  # cat is future: background
    assert stage_0.metainfo['classes'] == ('background', 'ant', 'bee')


def test_exemplars_and_their_mode_go_together(stage_1: dict[str, Any], exemplars: str) -> None:
    for options in (dict(mode='memory'), dict(exemplars=exemplars)):
        with pytest.raises(ValueError, match="mode='memory' goes with exemplars"):
            DATASETS.build(stage_1 | options)


def test_an_image_that_is_the_stages_and_an_exemplar_serves_as_both(
    stage_1: dict[str, Any], exemplars: str
) -> None:
    dataset = ReplayDataset(stage_1, exemplars, memory=2)
    assert {name: len(part) for name, part in dataset.parts.items()} == dict(stage=5, memory=2)
    assert dataset.ranges == dict(stage=range(5), memory=range(5, 7))
    found = [
        (Path(sample.img_path).stem, sample.source)
        for sample in (dataset[i]['data_samples'] for i in range(len(dataset)))
    ]
    assert found == [(name, 'stage') for name in 'cdefg'] + [('c', 'memory'), ('a', 'memory')]
    assert rows(dataset[0]) == ([0, 0], [3, 255])
    assert rows(dataset[5]) == ([1, 2], [3, 255])
    assert dataset.metainfo['classes'] == ('background', 'ant', 'bee', 'cat')
    assert len(list(dataset)) == 7
    with pytest.raises(IndexError, match='-1: a ReplayDataset is indexed from 0'):
        dataset[-1]


class InStage2(ReplayDataset):
    """Says that it is of another stage."""

    metainfo = dict(stage=2)


def test_what_is_drawn_for_a_replayed_image_depends_on_how_often_it_came_up(
    stage_1: dict[str, Any], exemplars: str, outside: dict[str, Any]
) -> None:
    jitter = [*PIPELINE[:2], dict(type='PhotoMetricDistortion'), PIPELINE[2]]
    stage_1['dataset']['pipeline'] = outside['pipeline'] = jitter

    def pixels(dataset: ReplayDataset, idx: int) -> list[int]:
        np.random.random(idx + 3)  # how the process's own generator stands is of no account
        return dataset[idx]['inputs'].flatten().tolist()

    dataset = ReplayDataset(stage_1, exemplars, memory=2, outside=outside, seed=4)
    again = ReplayDataset(stage_1, exemplars, memory=2, outside=outside, seed=4)
    other = ReplayDataset(stage_1, exemplars, memory=2, outside=outside, seed=5)
    later = InStage2(stage_1, exemplars, memory=2, outside=outside, seed=4)
    for idx in (5, 8):
        looks = [pixels(dataset, idx + 10 * number) for number in range(6)]
        assert len({tuple(look) for look in looks}) >= 3
        assert looks == [pixels(again, idx + 10 * number) for number in range(6)]
        assert looks != [pixels(other, idx + 10 * number) for number in range(6)]
        assert looks != [pixels(later, idx + 10 * number) for number in range(6)]
    samples = [dataset[idx]['data_samples'] for idx in (6, 16, 26)]
    assert [(sample.source, Path(sample.img_path).stem) for sample in samples] == [('memory', 'a')] * 3


def test_the_stages_images_are_told_the_epoch_where_they_ask_for_it(
    stage_1: dict[str, Any], exemplars: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    dataset = ReplayDataset(stage_1, exemplars, memory=2)
    monkeypatch.setattr(dataset.parts['stage'], 'set_epoch', told.append, raising=False)
    dataset.set_epoch(3)
    assert told == [3]


def test_outside_images_are_unlabelled(
    stage_1: dict[str, Any], exemplars: str, outside: dict[str, Any]
) -> None:
    dataset = ReplayDataset(stage_1, exemplars, memory=2, outside=outside)
    assert dataset.ranges['outside'] == range(7, 10)
    names = [Path(dataset[i]['data_samples'].img_path).name for i in range(7, 10)]
    assert names == ['y.JPG', 'z.jpeg', 'x.png']
    assert dataset[9]['data_samples'].source == 'outside'
    assert rows(dataset[9]) == ([0, 0], [0, 0])
    assert dataset[9]['inputs'].unique().tolist() == [200]


def test_an_outside_image_that_a_transform_gives_up_on_is_replaced(outside: dict[str, Any]) -> None:
    dataset = DATASETS.build(outside)
    dataset.pipeline.transforms.insert(0, lambda info: None if info['img_path'].endswith('y.JPG') else info)
    assert Path(dataset[0]['data_samples'].img_path).name in ('z.jpeg', 'x.png')


def test_masks_of_outside_images_are_never_read(
    stage_1: dict[str, Any], wrapped: dict[str, Any], tmp_path: Path
) -> None:
    cfg = dict(type='OutsideDataset', dataset=copy.deepcopy(wrapped), pipeline=[
        *PIPELINE[:1],
        dict(type='RandomChoice', transforms=[[dict(type='LoadAnnotations')]]),
        *PIPELINE[2:],
    ])  # fmt: skip
    (tmp_path / 'ann').rename(tmp_path / 'hidden')
    dataset = DATASETS.build(cfg)
    assert len(dataset) == 8
    assert rows(dataset[3]) == ([0, 0], [0, 0])
    assert 'seg_map_path' not in dataset[3]['data_samples'].metainfo


def test_a_folder_of_outside_images_must_be_there(tmp_path: Path) -> None:
    def build(root: str | None) -> None:
        DATASETS.build(dict(type='ImageFolder', root=root, lazy_init=True))

    with pytest.raises(ValueError, match='set outside_root=FOLDER'):
        build(None)
    with pytest.raises(FileNotFoundError, match=r'outside_root=.*nowhere: no such folder'):
        build(str(tmp_path / 'nowhere'))
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(ValueError, match='holds no image; expected files that end in'):
        build(str(tmp_path))


def test_nothing_to_replay_is_refused(stage_1: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='needs exemplars or outside images'):
        ReplayDataset(stage_1)


# Batches


class Sized(ReplayDataset):
    """Sources of any size, without files."""

    def __init__(self, **sizes: int) -> None:
        self.parts = {source: range(size) for source, size in sizes.items()}


def indices_of(dataset: Any, batch_size: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    sampler = DefaultSampler(dataset, shuffle=True, seed=5)
    batches = ReplayBatchSampler(sampler, batch_size, **options)
    sampler.set_epoch(epoch)
    result = list(batches)
    assert len(result) == len(batches)
    return result


def epoch_of(dataset: Any, *args: Any, **options: Any) -> list[list[int]]:
    """The batches as images of the data set, however often these were drawn before."""
    batches = indices_of(dataset, *args, **options)
    return [[index % len(dataset) for index in batch] for batch in batches]


def test_half_of_each_batch_is_replayed_and_each_stage_image_comes_once() -> None:
    dataset = Sized(stage=21, memory=5)
    batches = epoch_of(dataset, 8)
    for batch in batches[:-1]:
        assert [index < 21 for index in batch] == [True] * 4 + [False] * 4
    assert [index < 21 for index in batches[-1]] == [True, False]  # what is left, half and half
    flat = [index for batch in batches for index in batch]
    assert sorted(index for index in flat if index < 21) == list(range(21))
    replayed = Counter(index for index in flat if index >= 21)
    assert set(replayed) == set(range(21, 26))
    assert max(replayed.values()) - min(replayed.values()) <= 1


def test_the_stages_images_come_in_the_order_they_have_without_replay() -> None:
    dataset = Sized(stage=21, memory=5)
    own = [index for batch in epoch_of(dataset, 6, epoch=3) for index in batch if index < 21]
    plain = DefaultSampler(range(21), shuffle=True, seed=5)
    plain.set_epoch(3)
    assert own == list(plain)


def test_an_epoch_depends_on_its_number_alone() -> None:
    dataset = Sized(stage=21, memory=5, outside=9)
    first, second = epoch_of(dataset, 6, 0), epoch_of(dataset, 6, 1)
    assert first != second
    assert epoch_of(dataset, 6, 1) == second  # as after a resume: epoch 0 was not drawn here


def test_all_outside_images_come_up_over_the_epochs() -> None:
    dataset = Sized(stage=8, outside=40)
    flat = [
        index for epoch in range(10) for batch in epoch_of(dataset, 4, epoch) for index in batch
    ]
    assert Counter(index for index in flat if index >= 8) == dict.fromkeys(range(8, 48), 2)


@pytest.mark.parametrize('share', [0.5, None])
def test_no_index_comes_twice_in_a_stage(share: float | None) -> None:
    dataset = Sized(stage=8, memory=3)
    flat = [i for epoch in range(6) for batch in indices_of(dataset, 4, epoch, share=share) for i in batch]
    assert len(set(flat)) == len(flat)
    numbers = Counter(i // 11 for i in flat if i % 11 == 9)
    assert numbers == dict.fromkeys(range(16 if share else 6), 1)  # 48 places for three exemplars


def test_two_sources_share_the_replayed_half() -> None:
    batches = epoch_of(Sized(stage=12, memory=5, outside=5), 8)
    sources = ['stage' if i < 12 else 'memory' if i < 17 else 'outside' for i in batches[0]]
    assert sources == ['stage'] * 4 + ['memory'] * 2 + ['outside'] * 2


def test_a_last_batch_of_one_image_of_the_stage_has_one_of_each_source() -> None:
    last = epoch_of(Sized(stage=9, memory=5, outside=5), 8)[-1]
    sources = ['stage' if i < 9 else 'memory' if i < 14 else 'outside' for i in last]
    assert sources == ['stage', 'memory', 'outside']


def test_sources_of_one_size_are_drawn_each_in_an_order_of_its_own() -> None:
    flat = [i for batch in epoch_of(Sized(stage=40, memory=20, outside=20), 8) for i in batch]
    memory, outside = ([i - first for i in flat if first <= i < first + 20] for first in (40, 60))
    assert sorted(memory) == sorted(outside) == list(range(20))
    assert memory != outside


def test_mixed_in_every_image_comes_once() -> None:
    batches = epoch_of(Sized(stage=21, memory=5), 8, share=None)
    assert [len(batch) for batch in batches] == [8, 8, 8, 2]
    assert sorted(index for batch in batches for index in batch) == list(range(26))


def test_the_last_batch_may_be_dropped() -> None:
    batches = epoch_of(Sized(stage=21, memory=5), 8, drop_last=True)
    assert [len(batch) for batch in batches] == [8] * 5


@pytest.mark.parametrize('share', [0.5, None])
@pytest.mark.parametrize('count', [21, 20, 3])
@pytest.mark.parametrize('batch_size', [4, 3])
def test_processes_share_the_batches_of_one(
    batch_size: int, share: float | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where half a batch of one process is no half of a batch of both: 3 and 3, not 4 and 2."""
    dataset = Sized(stage=count, memory=5)
    alone = indices_of(dataset, 2 * batch_size, epoch=2, share=share)
    per_rank = []
    for rank in range(2):
        monkeypatch.setattr(shared_batches, 'get_dist_info', lambda rank=rank: (rank, 2))
        per_rank.append(indices_of(dataset, batch_size, epoch=2, share=share))
    for whole, *parts in zip(alone, *per_rank, strict=True):
        seen = Counter(index for part in parts for index in part)
        assert set(seen) == set(whole)
        assert sum(seen.values()) == max(len(whole), 2)  # no process is without an image
        assert abs(len(parts[0]) - len(parts[1])) <= 1


@pytest.mark.parametrize('share', [0.5, None])
def test_num_batch_per_epoch_counts_batches(
    share: float | None, stage_1: dict[str, Any], exemplars: str
) -> None:
    loader = Runner.build_dataloader(dict(
        dataset=dict(type='ReplayDataset', stage_images=stage_1, exemplars=exemplars, memory=2),
        batch_size=2, num_workers=0, num_batch_per_epoch=3,
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='ReplayBatchSampler', share=share)), seed=0)  # fmt: skip
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    sources = [{sample.source for sample in batch['data_samples']} for batch in batches]
    if share:
        assert sources == [{'stage', 'memory'}] * 3
        names = {Path(s.img_path).stem for b in batches for s in b['data_samples'] if s.source == 'stage'}
        assert names == set('cde')  # the first images, as mmengine's slice takes them
    else:  # an epoch is six of the seven images, each time others
        seen = set()
        for epoch in range(8):
            loader.batch_sampler.sampler.set_epoch(epoch)
            seen |= {(Path(s.img_path).stem, s.source) for b in loader for s in b['data_samples']}
        assert len(seen) == 7


def test_more_batches_than_there_are_images_are_no_error(
    stage_1: dict[str, Any], exemplars: str
) -> None:
    loader = Runner.build_dataloader(dict(
        dataset=dict(type='ReplayDataset', stage_images=stage_1, exemplars=exemplars, memory=2),
        batch_size=4, num_workers=0, num_batch_per_epoch=50,
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='ReplayBatchSampler')), seed=0)  # fmt: skip
    assert len(list(loader)) == 3  # five images, two a batch


@pytest.mark.parametrize(
    ('batch_size', 'share', 'sources', 'expected'),
    [(24, 0.5, 1, (12, 12)), (5, 0.5, 1, (3, 2)), (8, 0.5, 2, (4, 2, 2)), (8, 0.4, 2, (5, 2, 1))],
)
def test_batch_split(batch_size: int, share: float, sources: int, expected: tuple) -> None:
    assert batch_split(batch_size, share, sources) == expected


@pytest.mark.parametrize('share', [0, 1, -0.5, 1.5, True, 'half'])
def test_an_impossible_share_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match='expected a part of the batch, in'):
        batch_split(8, share, 1)


def test_a_batch_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r'batch_size=1 with replay_share=0.5 leaves 1 places'):
        batch_split(1, 0.5, 1)
    with pytest.raises(ValueError, match=r'for 2 source\(s\) of replay'):
        batch_split(2, 0.5, 2)


def test_another_dataset_under_the_sampler_is_refused() -> None:
    with pytest.raises(TypeError, match='DefaultSampler over a ReplayDataset, got DefaultSampler over range'):
        ReplayBatchSampler(DefaultSampler(range(8)), 4)


def test_an_endless_draw_can_be_entered_anywhere() -> None:
    whole = endless_draw(7, 0, 30, (1, 2))
    assert endless_draw(7, 11, 9, (1, 2)).tolist() == whole[11:20].tolist()
    for start in (0, 7, 14):
        assert sorted(whole[start : start + 7].tolist()) == list(range(7))
    assert whole[:7].tolist() != whole[7:14].tolist()
    assert endless_draw(7, 0, 30, (1, 3)).tolist() != whole.tolist()


def test_the_dataset_is_a_plain_incremental_one_without_replay(stage_1: dict[str, Any]) -> None:
    data = IncrementalDataset(**{key: value for key, value in stage_1.items() if key != 'type'})[0]
    assert 'source' not in data['data_samples'].metainfo
