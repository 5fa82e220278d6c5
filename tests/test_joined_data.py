# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A run on several data sets joined by mmengine's wrappers, with a memory and held-out images."""

import json
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS

from tests.test_bad_input import draw
from tests.test_configs import CONFIGS

CONFIG = """
_base_ = ['{configs}/_base_/segformer_tiny_shapes.py', '{configs}/sats/sats.py']
protocol = '3-3'
class_names = ['background', 'a', 'b', 'c', 'd', 'e', 'f']
north = dict(
    type='BaseSegDataset', data_root='{folder}/north', ann_file='train.txt', img_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='masks'), metainfo=dict(classes='$class_names'),
    pipeline='$train_pipeline')
south = dict(
    type='BaseSegDataset', data_root='{folder}/south', ann_file='train.txt', img_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='masks'), metainfo=dict(classes='$class_names'),
    pipeline='$train_pipeline')
train_dataset = dict(
    _delete_=True, type='ConcatDataset', datasets=['$north', dict(type='RepeatDataset', times=3, dataset='$south')])
eval_dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root='{folder}/north', ann_file='val.txt', img_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='masks'), metainfo=dict(classes='$class_names'),
    pipeline='$eval_pipeline')
epochs, crop_size, batch_size, num_workers, report = 1, 32, 4, 0, None
memory, held_out = 6, 0.5
work_dir = '{folder}/run'
"""


def test_a_run_on_joined_data(tmp_path: Path) -> None:
    for name in ('north', 'south'):
        draw(tmp_path / name)
    (tmp_path / 'own.py').write_text(CONFIG.format(configs=CONFIGS, folder=tmp_path))
    results = RUNNERS.build(Config.fromfile(tmp_path / 'own.py')).train()
    kept = json.loads((tmp_path / 'run/stage_1/exemplars.json').read_text())
    names = [item['image'] for item in kept['exemplars']]
    assert len(set(names)) == 6
    assert {name.split('/')[0] for name in names} == {'north', 'south'}
    # Of the 12 images of each, 8 show a class of the stage, half of them are held out, and the south's count thrice.
    assert results['stages'][0]['images'] == 4 + 3 * 4
    assert results['final']['all'] is not None
