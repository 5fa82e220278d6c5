# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""IncrementalDataset against label maps, file lists and tables written by hand."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from mmcv.transforms import RandomChoice
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmseg.datasets import ADE20KDataset, BaseSegDataset, PascalVOCDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from mmseg_sats.datasets.class_index import index as class_index
from mmseg_sats.datasets.incremental_dataset import IncrementalDataset, NoImagesError
from mmseg_sats.datasets.transforms import RelabelSegMap, relabel_table
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.protocol import Protocol
from tests.shared import shared_path

# Five classes; each map is its two rows. Names in the order in which mmseg lists them.
MAPS = {
    'a': ([0, 1], [1, 1]),
    'b': ([0, 2], [255, 2]),
    'c': ([1, 2], [0, 255]),
    'd': ([0, 3], [3, 0]),
    'e': ([1, 3], [0, 0]),
    'f': ([0, 4], [4, 255]),
    'g': ([2, 4], [0, 5]),
    'h': ([0, 5], [5, 5]),
    'i': ([3, 4], [3, 4]),
    'j': ([1, 5], [255, 0]),
    'k': ([0, 0], [0, 0]),
    'l': ([255, 255], [0, 0]),
    'm': ([4, 5], [0, 0]),
    'n': ([1, 2], [3, 255]),
    'o': ([2, 2], [2, 0]),
    'p': ([3, 5], [0, 3]),
    'q': ([1, 4], [4, 1]),
    'r': ([1, 2], [3, 4]),
    's': ([5, 0], [0, 255]),
    't': ([1, 3], [5, 0]),
}
CLASSES = ('background', 'ant', 'bee', 'cat', 'dog', 'eel')
PALETTE = [[0, 0, 0], [10, 0, 0], [20, 0, 0], [30, 0, 0], [40, 0, 0], [50, 0, 0]]
LOAD = [{'type': 'LoadAnnotations'}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_SATS_CACHE', str(tmp_path / 'cache'))


def write(root, maps):
    for folder in ('img', 'ann'):
        (root / folder).mkdir(exist_ok=True)
    for name, rows in maps.items():
        seg = np.array(rows, np.uint8)
        Image.fromarray(seg).save(root / 'ann' / f'{name}.png')
        Image.fromarray(np.zeros((*seg.shape, 3), np.uint8)).save(root / 'img' / f'{name}.jpg')


@pytest.fixture
def wrapped(tmp_path):
    write(tmp_path, MAPS)
    return {
        'type': 'BaseSegDataset',
        'data_root': str(tmp_path),
        'data_prefix': {'img_path': 'img', 'seg_map_path': 'ann'},
        'metainfo': {'classes': CLASSES, 'palette': PALETTE},
        'pipeline': LOAD,
        'serialize_data': False,  # spares mmengine's garbage collection, a fifth of a second
    }


def names(dataset):
    return ''.join(dataset.image_names())


def labels(dataset):
    """Name -> rows of the relabelled map."""
    return {
        name: tuple(dataset[i]['gt_seg_map'].tolist())
        for i, name in enumerate(dataset.image_names())
    }


@pytest.mark.parametrize(
    ('setting', 'expected'),
    [
        ('overlapped', ['abcegjnoqrt', 'deinprt', 'fgimqr', 'ghjmpst']),
        ('disjoint', ['abco', 'den', 'fiqr', 'ghjmpst']),
        ('sequential', ['abco', 'den', 'fiqr', 'ghjmpst']),
    ],
)
def test_training_images(wrapped, setting, expected):
    for stage, letters in enumerate(expected):
        dataset = IncrementalDataset(wrapped, '2-1', stage, setting=setting)
        assert names(dataset) == letters
        assert dataset.indices.tolist() == ['abcdefghijklmnopqrst'.index(x) for x in letters]
        assert len(dataset) == len(letters)


def test_training_labels_overlapped(wrapped):
    # Stage 1 learns cat (3) as channel 3; ant and bee are old, dog and eel are future.
    assert labels(IncrementalDataset(wrapped, '2-1', 1)) == {
        'd': ([0, 3], [3, 0]),
        'e': ([0, 3], [0, 0]),
        'i': ([3, 0], [3, 0]),
        'n': ([0, 0], [3, 255]),
        'p': ([3, 0], [0, 3]),
        'r': ([0, 0], [3, 0]),
        't': ([0, 3], [0, 0]),
    }


def test_training_labels_sequential_keep_the_old(wrapped):
    assert labels(IncrementalDataset(wrapped, '2-1', 1, setting='sequential')) == {
        'd': ([0, 3], [3, 0]),
        'e': ([1, 3], [0, 0]),
        'n': ([1, 2], [3, 255]),
    }
    assert labels(IncrementalDataset(wrapped, '2-1', 1, setting='disjoint')) == {
        'd': ([0, 3], [3, 0]),
        'e': ([0, 3], [0, 0]),
        'n': ([0, 0], [3, 255]),
    }


def test_remainder_stage(wrapped):
    # 2-2 on five classes ends with eel (5) alone, channel 5.
    dataset = IncrementalDataset(wrapped, '2-2', 2)
    assert names(dataset) == 'ghjmpst'
    assert dataset.stage.new == (5,)
    assert labels(dataset)['g'] == ([0, 0], [0, 5])
    assert labels(dataset)['j'] == ([0, 5], [255, 0])


ORDER = [4, 2, 5, 1, 3]


def test_shuffled_order(wrapped):
    # Learned: dog 4 -> 1, bee 2 -> 2 | eel 5 -> 3 | ant 1 -> 4 | cat 3 -> 5.
    first = IncrementalDataset(wrapped, '2-1', 0, class_order=ORDER)
    assert names(first) == 'bcfgimnoqr'
    assert labels(first)['g'] == ([2, 1], [0, 0])
    third = IncrementalDataset(wrapped, '2-1', 2, class_order=ORDER, setting='disjoint')
    assert names(third) == 'acjq'
    assert labels(third)['c'] == ([4, 0], [0, 255])
    assert third.metainfo['classes'] == ('background', 'dog', 'bee', 'eel', 'ant')
    assert third.metainfo['palette'] == [[0] * 3, [40, 0, 0], [20, 0, 0], [50, 0, 0], [10, 0, 0]]


def test_inverse_order_gives_the_masks_back(wrapped):
    last = IncrementalDataset(
        wrapped, '2-1', 3, class_order=ORDER, mode='eval', eval_images='all'
    )
    table_back = np.arange(256)
    for channel, class_id in enumerate(ORDER, start=1):
        table_back[channel] = class_id
    assert last.table[:6].tolist() == [0, 4, 2, 5, 1, 3]
    for name, rows in labels(last).items():
        assert table_back[np.array(rows)].tolist() == list(MAPS[name])


def test_evaluation(wrapped):
    def build(**options):
        return IncrementalDataset(wrapped, '2-1', 1, mode='eval', **options)

    seen = build()
    assert names(seen) == 'abcdegijnopqrt'
    assert labels(seen)['r'] == ([1, 2], [3, 0])
    assert labels(seen)['t'] == ([1, 3], [0, 0])
    assert labels(seen)['j'] == ([1, 0], [255, 0])
    ignored = build(eval_future='ignore')
    assert names(ignored) == names(seen)
    assert labels(ignored)['r'] == ([1, 2], [3, 255])
    assert labels(ignored)['t'] == ([1, 3], [255, 0])
    assert labels(ignored)['j'] == ([1, 255], [255, 0])
    everything = build(eval_images='all')
    assert names(everything) == 'abcdefghijklmnopqrst'
    assert labels(everything)['h'] == ([0, 0], [0, 0])
    assert labels(everything)['l'] == ([255, 255], [0, 0])


def test_at_the_last_stage_the_choice_for_future_classes_agrees(wrapped):
    tables = [
        IncrementalDataset(wrapped, '2-1', 3, mode='eval', eval_future=choice).table
        for choice in ('background', 'ignore')
    ]
    np.testing.assert_array_equal(*tables)
    assert tables[0][:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert set(tables[0][6:].tolist()) == {255}


def test_metainfo_by_stage(wrapped):
    dataset = IncrementalDataset(wrapped, '2-1', 1)
    assert dataset.metainfo == {
        'classes': ('background', 'ant', 'bee', 'cat'),
        'palette': PALETTE[:4],
        'num_base': 3,
        'stage': 1,
        'label_map': None,
        'reduce_zero_label': False,
    }
    dataset.metainfo['classes'] = ()
    assert len(dataset.metainfo['classes']) == dataset.stage.num_channels == 4
    assert dataset.class_names == CLASSES


def test_background_may_be_written_with_a_capital(wrapped):
    wrapped['metainfo'] = wrapped['metainfo'] | {'classes': ('Background', *CLASSES[1:])}
    dataset = IncrementalDataset(wrapped, '2-1', 0)
    assert dataset.metainfo['classes'] == ('Background', 'ant', 'bee')


def test_joint_with_the_split_of_a_protocol(wrapped):
    dataset = IncrementalDataset(wrapped, 'joint', 0, split='2-1')
    assert names(dataset) == 'abcdefghijmnopqrst'
    assert dataset.metainfo['num_base'] == 3
    assert dataset.metainfo['classes'] == CLASSES
    assert labels(dataset)['r'] == ([1, 2], [3, 4])


def test_relabelling_comes_before_the_crop_looks(wrapped):
    pipeline = [
        {'type': 'LoadImageFromFile'},
        *LOAD,
        {'type': 'mmseg.RandomCrop', 'crop_size': (2, 2), 'cat_max_ratio': 0.75},
    ]
    dataset = IncrementalDataset({**wrapped, 'pipeline': pipeline}, '2-1', 0)
    kinds = [type(t).__name__ for t in dataset.pipeline.transforms]
    assert kinds == ['LoadImageFromFile', 'LoadAnnotations', 'RelabelSegMap', 'RandomCrop']
    seg = dataset[0]['gt_seg_map']
    assert (seg.dtype, seg.tolist()) == (np.uint8, [[0, 1], [1, 1]])


def test_pipeline_argument_replaces_the_wrapped_one(wrapped):
    broken = {**wrapped, 'pipeline': [{'type': 'RandomCrop'}]}
    dataset = IncrementalDataset(broken, '2-1', 0, pipeline=LOAD)
    assert dataset[0]['gt_seg_map'].tolist() == [[0, 1], [1, 1]]


def test_masks_that_are_loaded_twice_are_relabelled_behind_each(wrapped):
    dataset = IncrementalDataset(wrapped, '2-1', 0, pipeline=LOAD * 2)
    kinds = [type(t).__name__ for t in dataset.pipeline.transforms]
    assert kinds == ['LoadAnnotations', 'RelabelSegMap'] * 2


def test_masks_loaded_inside_other_transforms(wrapped):
    choice = RandomChoice([[TRANSFORMS.build(LOAD[0])], [TRANSFORMS.build(LOAD[0])]])
    augmentation = TRANSFORMS.build(
        {'type': 'TestTimeAug', 'transforms': [[LoadAnnotations(), LoadAnnotations()]]}
    )
    dataset = IncrementalDataset(wrapped, '2-1', 2, pipeline=[choice])
    assert labels(dataset)['m'] == ([4, 0], [0, 0])
    dataset = IncrementalDataset(wrapped, '2-1', 2, mode='eval', pipeline=[augmentation])
    maps = dataset[0]['gt_seg_map']
    assert [m.tolist() for m in maps] == [[[0, 1], [1, 1]]] * 2
    # The given object is as it was: it may serve another stage too.
    assert [type(t) for t in choice.transforms[0].transforms] == [LoadAnnotations]


def test_one_instance_serves_several_stages(wrapped):
    choice = RandomChoice([[LoadAnnotations()]])
    inner = BaseSegDataset(**{k: v for k, v in wrapped.items() if k not in ('type', 'pipeline')},
                           pipeline=[choice])
    stages = [IncrementalDataset(inner, '2-1', k) for k in range(4)]
    assert [names(stage) for stage in stages] == ['abcegjnoqrt', 'deinprt', 'fgimqr', 'ghjmpst']
    assert labels(stages[3])['g'] == ([0, 0], [0, 5])
    assert inner.pipeline.transforms == [choice]
    assert [type(t) for t in choice.transforms[0].transforms] == [LoadAnnotations]
    assert inner.metainfo['classes'] == CLASSES


def test_indices_of_the_wrapped_dataset_are_honoured(wrapped):
    dataset = IncrementalDataset({**wrapped, 'indices': [17, 3, 5]}, '2-1', 1)
    assert names(dataset) == 'rd'
    assert dataset.indices.tolist() == [0, 1]


def test_surface_of_a_dataset(wrapped):
    dataset = IncrementalDataset(wrapped, '2-1', 1)
    assert dataset.get_data_info(1)['seg_map_path'].endswith('ann/e.png')
    assert dataset.get_data_info(1)['sample_idx'] == 1
    assert dataset.get_data_info(-1)['seg_map_path'].endswith('ann/t.png')
    assert dataset.get_data_info(-1)['sample_idx'] == 6
    assert dataset.get_cat_ids(3) == [0, 3]
    assert np.flatnonzero(dataset.presence[3]).tolist() == [1, 2, 3, 255]
    with pytest.raises(IndexError):
        dataset[7]
    with pytest.raises(ValueError, match='read-only'):
        dataset.indices[0] = 3


def test_copies_and_wrappers(wrapped):
    dataset = IncrementalDataset(wrapped, '2-1', 1)
    for twin in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert labels(twin) == labels(dataset)
    cfg = {'type': 'mmseg.IncrementalDataset', 'dataset': wrapped, 'protocol': '2-1', 'stage': 1}
    assert labels(DATASETS.build(cfg)) == labels(dataset)
    both = ConcatDataset([cfg, cfg])
    assert (len(both), both.metainfo) == (14, dataset.metainfo)
    assert both[7]['gt_seg_map'].tolist() == [[0, 3], [3, 0]]
    assert len(RepeatDataset(cfg, times=2)) == 14
    assert 'pipeline' in wrapped


def test_lazy_init_reads_nothing(wrapped, monkeypatch):
    real = class_index.scan_masks
    monkeypatch.setattr(class_index, 'scan_masks', None)
    gone = {**wrapped, 'data_root': '/no/such/folder'}
    dataset = IncrementalDataset(gone, '2-1', 3, lazy_init=True)
    assert dataset.metainfo['classes'] == CLASSES
    with pytest.raises(FileNotFoundError, match='/no/such/folder'):
        dataset.full_init()
    monkeypatch.setattr(class_index, 'scan_masks', real)
    assert len(IncrementalDataset(wrapped, '2-1', 3, lazy_init=True)) == 7


def test_stages_share_one_scan(wrapped, monkeypatch):
    IncrementalDataset(wrapped, '2-1', 0)
    monkeypatch.setattr(class_index, 'scan_masks', None)
    assert names(IncrementalDataset(wrapped, '2-1', 3, mode='eval')) == 'abcdefghijmnopqrst'


class Refuse:
    """A transform that gives up on some images."""

    def __init__(self, letters):
        self.letters = letters

    def __call__(self, results):
        return None if results['seg_map_path'][-5] in self.letters else results


def test_images_that_the_pipeline_refuses(wrapped):
    pipeline = [*LOAD, Refuse('deinpr')]
    training = IncrementalDataset(wrapped, '2-1', 1, pipeline=pipeline)
    assert training[0]['seg_map_path'].endswith('t.png')
    evaluation = IncrementalDataset(wrapped, '2-1', 1, mode='eval', pipeline=pipeline)
    assert evaluation[0]['seg_map_path'].endswith('a.png')
    with pytest.raises(RuntimeError, match=r'eval pipeline gave None for image 3 .*d\.jpg'):
        evaluation[3]


class Draw:
    """A transform that adds a random number."""

    def __call__(self, results):
        return results | {'drawn': np.random.random()}


def test_what_is_drawn_depends_on_the_stage_and_the_image_however_it_is_named(wrapped):
    def drawn(stage, idx):
        dataset = IncrementalDataset(wrapped, '2-1', stage, pipeline=[*LOAD, Draw()], seed=3)
        dataset.set_epoch(0)
        return dataset[idx]['drawn']

    assert drawn(1, -1) == drawn(1, 6)
    assert len({drawn(1, 0), drawn(1, 6), drawn(2, 0)}) == 3


ADE_MAPS = {'a': ([0, 1],), 'b': ([150, 100],), 'c': ([101, 110],), 'd': ([0, 0],)}


def test_ade20k_has_151_labels(tmp_path):
    write(tmp_path, ADE_MAPS)
    ade = {
        'type': 'ADE20KDataset',
        'data_root': str(tmp_path),
        'data_prefix': {'img_path': 'img', 'seg_map_path': 'ann'},
        'reduce_zero_label': False,
        'pipeline': LOAD,
    }
    first = IncrementalDataset(ade, '100-10', 0)
    meta = first.metainfo
    assert meta['classes'] == ('background', *ADE20KDataset.METAINFO['classes'][:100])
    assert meta['palette'] == [[0, 0, 0], *ADE20KDataset.METAINFO['palette'][:100]]
    assert meta['num_base'] == 101
    # A mask one pixel high: mmseg's loader drops that axis.
    assert {n: first[i]['gt_seg_map'].tolist() for i, n in enumerate('ab')} == {
        'a': [0, 1], 'b': [0, 100],
    }
    assert names(IncrementalDataset(ade, '100-10', 1)) == 'c'
    last = IncrementalDataset(ade, '100-10', 5, mode='eval')
    assert len(last.metainfo['classes']) == 151
    assert names(last) == 'abc'
    assert last.table[:151].tolist() == list(range(151))
    with pytest.raises(ValueError, match=r'ADE20KDataset has reduce_zero_label=True'):
        IncrementalDataset({**ade, 'reduce_zero_label': True}, '100-10', 0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'setting': 'disjunct'}, r"setting='disjunct'.*mean 'disjoint'"),
        ({'mode': 'evaluation'}, r"mode='evaluation'.*expected one of \['train', 'eval', 'memory'\]"),
        ({'mode': 'evl'}, r"mode='evl'.*mean 'eval'"),
        ({'eval_future': 'ignored'}, r"eval_future='ignored'.*mean 'ignore'"),
        ({'eval_images': 'sean'}, r"eval_images='sean'.*mean 'seen'"),
        ({'stage': 4}, r"stage=4: protocol '2-1' with 5 classes has the stages 0 to 3"),
        ({'protocol': '6-1'}, r"'6-1' starts with 6 classes.*only 5"),
        ({'split': '2-1'}, r"belongs to protocol 'joint' alone"),
        ({'class_order': [1, 2]}, r'2 of 5 classes'),
        ({'ignore_index': 5}, r'ignore_index=5 must be above'),
        ({'ignore_index': 256}, r'ignore_index=256 must be .*at most 255'),
        ({'pipeline': [{'type': 'LoadImageFromFile'}]}, r"needs LoadAnnotations.*'LoadImageFrom"),
        ({'pipeline': [{'type': 'LoadAnnotations', 'reduce_zero_label': True}]}, 'shifts all ids'),
    ],
)
def test_bad_options(wrapped, options, message):
    with pytest.raises(ValueError, match=message):
        IncrementalDataset(**{'dataset': wrapped, 'protocol': '2-1', 'stage': 0, **options})


def test_wrapped_datasets_that_cannot_be_used(wrapped, tmp_path):
    inner = IncrementalDataset(wrapped, '2-1', 0)
    with pytest.raises(TypeError, match=r'PascalVOCDataset, got IncrementalDataset'):
        IncrementalDataset(inner, '2-1', 0)
    with pytest.raises(ValueError, match=r'0 classes and 0 colours'):
        IncrementalDataset({**wrapped, 'metainfo': None}, '2-1', 0)
    with pytest.raises(ValueError, match=r"has no 'seg_map_path'; data_prefix"):
        IncrementalDataset({**wrapped, 'data_prefix': {'img_path': 'img'}}, '2-1', 0)
    with pytest.raises(FileNotFoundError, match=r'ann_file .*trian\.txt does not exist'):
        IncrementalDataset({**wrapped, 'ann_file': 'trian.txt'}, '2-1', 0)
    (tmp_path / 'empty').mkdir()
    empty = {**wrapped, 'data_prefix': {'img_path': 'empty', 'seg_map_path': 'ann'}}
    for serialize in (False, True):
        with pytest.raises(ValueError, match=r'BaseSegDataset gives no images .*empty'):
            IncrementalDataset({**empty, 'serialize_data': serialize}, '2-1', 0)


def test_chosen_classes_make_a_label_map(tmp_path):
    voc = {
        'type': 'ADE20KDataset', 'data_root': str(tmp_path), 'reduce_zero_label': False,
        'metainfo': {'classes': ('wall', 'sky')}, 'pipeline': LOAD,
    }
    with pytest.raises(ValueError, match=r'ADE20KDataset has a label_map'):
        IncrementalDataset(voc, '1-1', 0, lazy_init=True)


def test_missing_mask(wrapped, tmp_path):
    (tmp_path / 'ann' / 'n.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'ann/n\.png does not exist'):
        IncrementalDataset(wrapped, '2-1', 0)


def test_label_out_of_range(wrapped, tmp_path):
    write(tmp_path, {'u': ([0, 6], [1, 1])})
    with pytest.raises(ValueError, match=r'ann/u\.png holds label 6 .*1 to 5 and 255'):
        IncrementalDataset(wrapped, '2-1', 0)


def test_empty_stage(wrapped):
    none = {**wrapped, 'indices': [0, 10, 17]}
    message = r"'2-1' stage 3: none of 3 images of BaseSegDataset.*eel \(5\).*'overlapped'"
    with pytest.raises(ValueError, match=message):
        IncrementalDataset(none, '2-1', 3)
    message = r"for eval with the classes ant \(1\), bee \(2\) under eval_images='seen'"
    with pytest.raises(ValueError, match=message):
        IncrementalDataset({**wrapped, 'indices': [10, 11]}, '2-1', 0, mode='eval')
    assert len(IncrementalDataset({**wrapped, 'indices': [10, 11]}, '2-1', 0, mode='eval',
                                  eval_images='all')) == 2


def test_stages_before_the_first_that_is_checked_need_no_images(wrapped, tmp_path):
    for name, rows in MAPS.items():
        if np.isin([1, 2], rows).any():
            (tmp_path / 'ann' / f'{name}.png').unlink()
            (tmp_path / 'img' / f'{name}.jpg').unlink()
    dataset = IncrementalDataset(wrapped, '2-1', 1)
    dataset.check_stages(1)
    with pytest.raises(NoImagesError, match='stage 0'):
        dataset.check_stages()


def test_table_by_hand():
    protocol = Protocol('2-1', num_classes=4, class_order=[3, 1, 4, 2])
    assert relabel_table(protocol, 1)[:5].tolist() == [0, 0, 0, 0, 3]
    assert relabel_table(protocol, 1, setting='sequential')[:5].tolist() == [0, 2, 0, 1, 3]
    assert relabel_table(protocol, 1, 'eval')[:5].tolist() == [0, 2, 0, 1, 3]
    ignoring = relabel_table(protocol, 1, 'eval', eval_future='ignore', ignore_index=9)
    assert ignoring[:6].tolist() == [0, 2, 9, 1, 3, 9]
    for mode in ('train', 'memory'):  # what becomes of future classes in evaluation is of no account
        assert (relabel_table(protocol, 0, mode, eval_future='ignore')[[2, 4]] == 0).all()


def test_transform_agrees_with_a_loop_over_pixels():
    table = np.random.default_rng(1).permutation(256)
    seg = np.random.default_rng(2).integers(0, 256, (13, 7), dtype=np.uint8)
    for view in (seg, seg[::2, ::3], seg.T, seg[0]):  # the last as of a mask one pixel high
        given = view.copy()
        result = RelabelSegMap(table)({'gt_seg_map': view})['gt_seg_map']
        expected = [int(table[label]) for label in view.flatten().tolist()]
        assert (result.dtype, result.shape) == (np.uint8, view.shape)
        assert result.flatten().tolist() == expected
        np.testing.assert_array_equal(view, given)


def test_transform_from_a_config_and_its_errors():
    transform = TRANSFORMS.build({'type': 'RelabelSegMap', 'table': list(range(256))})
    with pytest.raises(KeyError, match='LoadAnnotations'):
        transform({})
    with pytest.raises(TypeError, match='uint8, got int64'):
        transform({'gt_seg_map': np.zeros((2, 2), np.int64)})
    with pytest.raises(ValueError, match='256 whole numbers'):
        RelabelSegMap([0, 1])
    with pytest.raises(ValueError, match='0 to 255, got -1 to 0'):
        RelabelSegMap([-1] + [0] * 255)


def test_voc_photographs():
    root = shared_path('data/voc_mini')
    voc = {
        'type': 'PascalVOCDataset',
        'data_root': str(root),
        'data_prefix': {'img_path': 'JPEGImages', 'seg_map_path': 'SegmentationClass'},
        'ann_file': 'ImageSets/Segmentation/smoke.txt',
        'pipeline': [{'type': 'LoadImageFromFile'}, *LOAD],
    }
    listed = (root / 'ImageSets/Segmentation/smoke.txt').read_text().split()
    truth = {
        name: np.array(Image.open(root / 'SegmentationClass' / f'{name}.png')) for name in listed
    }
    for stage in range(6):
        new = list(range(1, 16)) if stage == 0 else [15 + stage]
        dataset = IncrementalDataset(voc, '15-1', stage)
        picked = [name for name in listed if np.isin(truth[name], new).any()]
        assert dataset.image_names() == picked
        data, seg = dataset[0], truth[picked[0]]
        expected = np.where(np.isin(seg, [*new, 255]), seg, 0)
        np.testing.assert_array_equal(data['gt_seg_map'], expected)
        assert data['img'].shape[:2] == seg.shape
        assert dataset.metainfo['classes'] == PascalVOCDataset.METAINFO['classes'][: 16 + stage]
        assert dataset.metainfo['num_base'] == 16


def test_street_photographs_in_21_stages():
    root = shared_path('data/ccp_mini')
    cfg = Config.fromfile(Path(__file__).parents[1] / 'configs/sats/segformer_b0_ccp_mini_10-1.py')
    cfg.data_root = str(root)
    protocol = build_protocol(cfg)
    assert len(protocol.stages) == 21
    masks = {path.stem: np.unique(np.array(Image.open(path))) for path in sorted((root / 'masks').iterdir())}
    train, val = ((root / f'{part}.txt').read_text().split() for part in ('train', 'val'))
    for index in (0, 7, 20):
        stage = protocol.stages[index]
        stage_cfg = build_stage_config(cfg, protocol, stage, 'work_dirs/run')
        dataset = DATASETS.build(stage_cfg.train_dataloader.dataset)
        # Classes are in the order of their labels, so class i has number i in the masks.
        assert dataset.image_names() == [name for name in train if np.isin(masks[name], stage.new).any()]
        evaluation = DATASETS.build(stage_cfg.test_dataloader.dataset)
        assert evaluation.image_names() == [name for name in val if np.isin(masks[name], stage.seen).any()]
    names = (root / 'classes.txt').read_text().split()
    assert list(dataset.class_names) == ['background', *names]


def without_background(wrapped, classes, maps, root, **options):
    """A plain data set of three classes; ``options`` are IncrementalDataset's."""
    write(root, maps)
    palette = [[i, 0, 0] for i in range(len(classes))]
    plain = {**wrapped, 'metainfo': {'classes': classes, 'palette': palette}}
    return IncrementalDataset(plain, '2-1' if len(classes) > 2 else '1-1', 0, **options)


STREET = {'a': ([0, 1], [1, 255]), 'b': ([2, 0], [2, 2])}


@pytest.fixture
def street(wrapped, tmp_path):
    for path in (*tmp_path.glob('img/*'), *tmp_path.glob('ann/*')):
        path.unlink()
    return wrapped, ('road', 'walk', 'wall'), STREET, tmp_path


def test_a_class_at_label_0_does_not_silently_become_background(street):
    message = r"label 0 background or 'road', .*background='road'.*no_background=True.*mask_values=dict\(road="
    with pytest.raises(ValueError, match=message):
        without_background(*street)
    shifted = without_background(*street, no_background=True)
    assert shifted.class_names == ('background', 'road', 'walk', 'wall')
    assert labels(shifted) == {'a': ([1, 2], [2, 255]), 'b': ([0, 1], [0, 0])}  # wall is not seen yet
    meant = without_background(*street, background='road')
    assert meant.metainfo['classes'] == ('road', 'walk', 'wall')
    assert labels(meant)['a'] == ([0, 1], [1, 255])
    numbered = without_background(*street, mask_values={'road': 0, 'walk': 2, 'wall': 1})
    assert labels(numbered) == {'a': ([1, 0], [0, 255]), 'b': ([2, 1], [2, 2])}


@pytest.mark.parametrize('name', ['BACKGROUND', '_background_', 'bg', 'Void', 'other', 'unlabeled', 'null', 'clutter'])
def test_names_of_background(street, name):
    wrapped, classes, maps, root = street
    dataset = without_background(wrapped, (name, *classes[1:]), maps, root, eval_images='all', mode='eval')
    assert dataset.metainfo['classes'] == (name, 'walk', 'wall')
    assert labels(dataset)['a'] == ([0, 1], [1, 255])


def test_the_last_label_in_a_mask_tells_that_0_is_background(street, tmp_path):
    wrapped, classes, _, root = street
    dataset = without_background(wrapped, classes, STREET | {'c': ([0, 3],)}, root)
    assert dataset.class_names == ('background', *classes)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(background='walk'), "background='walk': expected the class of label 0, which is 'road'"),
        (dict(background='road', no_background=True), "no_background=True, but background is 'road'"),
        (dict(no_background=1), 'no_background=1: expected True or False'),
        (dict(no_background=True, mask_values=dict(road=0)), 'expected one of the two'),
        (dict(mask_values=dict(rod=0)), r"names 'rod', which is no class \(did you mean 'road'"),
    ],
)
def test_what_label_0_is_must_be_said_rightly(street, options, message):
    with pytest.raises(ValueError, match=message):
        without_background(*street, **options)


def test_masks_of_0_and_255_are_recognised(street):
    wrapped, _, _, root = street
    with pytest.raises(NoImagesError, match=r'0 and 255 alone, and 255 is ignored: .*mask_values=dict\(crack=255\)'):
        without_background(wrapped, ('background', 'dent', 'crack'), {'a': ([0, 255],)}, root)
    dataset = without_background(wrapped, ('background', 'dent', 'crack'), {'a': ([0, 255],)}, root,
                                 mask_values=dict(crack=255), mode='eval', eval_images='all')
    assert dataset.presence[0, :3].tolist() == [True, False, True]


def test_an_image_that_is_listed_twice_is_used_once(wrapped, tmp_path):
    (tmp_path / 'list.txt').write_text('e\na\nb\ne\na\n')
    listed = {**wrapped, 'ann_file': 'list.txt', 'img_suffix': '.jpg'}
    dataset = IncrementalDataset(listed, '2-1', 0)
    assert names(dataset) == 'eab'
    assert [path[-5:] for path in dataset.repeated_images] == ['e.jpg', 'a.jpg']
    halves = [IncrementalDataset(listed, '2-1', 0, held_out=0.5, mode=mode) for mode in ('train', 'eval')]
    assert sorted(''.join(map(names, halves))) == ['a', 'b', 'e']


def test_a_list_with_a_byte_order_mark(wrapped, tmp_path):
    (tmp_path / 'list.txt').write_bytes('a\r\nb\r\n'.encode('utf-8-sig'))
    listed = {**wrapped, 'ann_file': 'list.txt', 'img_suffix': '.jpg'}
    with pytest.raises(ValueError, match=r'list\.txt starts with a byte order mark'):
        IncrementalDataset(listed, '2-1', 0)
    (tmp_path / 'list.txt').write_bytes(b'a\r\nb\r\n')
    assert names(IncrementalDataset(listed, '2-1', 0)) == 'ab'


def test_masks_in_another_tree_are_allowed_by_a_word(wrapped, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'img').rename(tmp_path / 'data/img')
    (tmp_path / 'data/list.txt').write_text('a\nb\n')
    wrapped |= {'data_root': str(tmp_path / 'data'), 'ann_file': 'list.txt', 'img_suffix': '.jpg',
                'data_prefix': {'img_path': 'img', 'seg_map_path': str(tmp_path / 'ann')}}
    with pytest.raises(ValueError, match=r'ann/a\.png leaves the data root .*mask_root=FOLDER'):
        IncrementalDataset(wrapped, '2-1', 0)
    with pytest.raises(ValueError, match=r'ann/a\.png leaves the data root .* and .*elsewhere'):
        IncrementalDataset(wrapped, '2-1', 0, mask_root=str(tmp_path / 'elsewhere'))
    assert names(IncrementalDataset(wrapped, '2-1', 0, mask_root=str(tmp_path / 'ann'))) == 'ab'
    (tmp_path / 'data/ann').symlink_to(tmp_path / 'ann')
    wrapped['data_prefix'] = {'img_path': 'img', 'seg_map_path': 'ann'}
    assert names(IncrementalDataset(wrapped, '2-1', 0)) == 'ab'


@pytest.fixture
def two_folders(wrapped, tmp_path):
    """Configs of two data sets whose images have the same names."""
    parts = []
    for folder, letters in (('north', 'abd'), ('south', 'ae')):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, {letter: MAPS[letter] for letter in letters})
        parts.append({**wrapped, 'data_root': str(tmp_path / folder)})
    return parts


def test_several_data_sets_as_one(two_folders):
    north, south = two_folders
    both = dict(type='ConcatDataset', datasets=[north, dict(type='RepeatDataset', times=2, dataset=south)])
    dataset = IncrementalDataset(both, '2-1', 0)
    assert dataset.image_names() == ['north/img/a', 'north/img/b', *['south/img/a'] * 2, *['south/img/e'] * 2]
    assert dataset[5]['gt_seg_map'].tolist() == [[1, 0], [0, 0]]
    assert dataset.repeated_images == []
    evaluation = IncrementalDataset(both, '2-1', 1, mode='eval')
    assert evaluation.image_names() == ['north/img/a', 'north/img/b', 'north/img/d', 'south/img/a', 'south/img/e']
    built = ConcatDataset([DATASETS.build(part) for part in two_folders])
    assert IncrementalDataset(built, '2-1', 1).image_names() == ['north/img/d', 'south/img/e']
    assert len(IncrementalDataset(dict(type='RepeatDataset', times=3, dataset=north), '2-1', 0)) == 6


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(metainfo=dict(classes=CLASSES[:3], palette=PALETTE[:3])), r'part 1 \(BaseSegDataset\) has the classes'),
        (dict(reduce_zero_label=True), 'part 1 .* has the reduce_zero_label True'),
        (dict(pipeline=[*LOAD, dict(type='RandomFlip', prob=0.5)]), 'have different pipelines: expected one for all'),
        (dict(type='ConcatDataset', datasets=[]), None),
    ],
)
def test_parts_that_do_not_fit(two_folders, change, message):
    north, south = two_folders
    parts = [north, south | change]
    if message is None:
        assert len(IncrementalDataset(dict(type='ConcatDataset', datasets=parts), '2-1', 0)) == 2
        parts, message = parts[1:], 'ConcatDataset of nothing'
    with pytest.raises(ValueError, match=message):
        IncrementalDataset(dict(type='ConcatDataset', datasets=parts), '2-1', 0)
