# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/own_data.md on photographs: a SegFormer without background, five classes known, three to learn."""

import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from tests.foreign import PAGE, code_blocks, commands, lay_out, read_mask, write_split
from tests.shared import shared_path
from tests.test_tools import run

# VOC's numbers of the classes that stand in for the page's: road, grass, building, car, person ...
OLD = [1, 6, 8, 19, 20]  # aeroplane, bus, cat, train, tvmonitor
NEW = {10: 11, 17: 12, 14: 40}  # cow, sheep, motorbike in the place of crate, pallet, forklift
DRAWN_OLD = {number: 101 + place for place, number in enumerate(OLD)}
NAMES = ['road', 'grass', 'building', 'car', 'person']
OPTIONS = ['crop_size=128', 'batch_size=8', 'num_workers=1', 'epochs=3', 'head_lr_mult=10.0',
           'later_stages.lr=4e-4', 'distillation.output=None']  # fmt: skip


def pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    names = (root / f'ImageSets/Segmentation/{split}.txt').read_text().split()
    return [
        (root / f'JPEGImages/{name}.jpg', root / f'SegmentationClass/{name}.png') for name in names
    ]


def train_old_model(folder: Path, data: Path, weights: Path) -> None:
    """An ordinary mmseg run on the old classes; background and all the rest are ignored."""
    shipped = Config.fromfile(Path(__file__).parents[1] / 'configs/sats/segformer_b0_voc_mini_15-1.py')
    model = shipped.model.to_dict()
    for key in ('pseudo_labeler', 'distillation', 'classifier_init'):
        model.pop(key)
    model.update(type='EncoderDecoder')
    model['backbone'].update(
        type='MixVisionTransformer', init_cfg=dict(type='Pretrained', checkpoint=str(weights))
    )
    model['decode_head'].update(
        num_classes=len(OLD),
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False),
    )
    model['data_preprocessor'].update(size=(128, 128))
    dataset = dict(
        type='BaseSegDataset',
        metainfo=dict(classes=NAMES),
        data_root=str(data),
        data_prefix=dict(img_path='rgb/train', seg_map_path='labels/train'),
        reduce_zero_label=True,  # background is no class of this model: ignored
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', reduce_zero_label=True),
            dict(type='RandomResize', scale=(512, 128), ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type='RandomCrop', crop_size=(128, 128), cat_max_ratio=0.75),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs'),
        ],
    )
    cfg = Config(
        dict(
            default_scope='mmseg',
            work_dir=str(folder / 'run'),
            model=model,
            randomness=dict(seed=0),
            train_cfg=dict(by_epoch=True, max_epochs=12),
            train_dataloader=dict(
                batch_size=8,
                num_workers=1,
                sampler=dict(type='DefaultSampler', shuffle=True),
                dataset=dataset,
            ),
            optim_wrapper=dict(
                optimizer=dict(type='AdamW', lr=4e-4, weight_decay=0.01),
                paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0))),
            ),
            log_processor=dict(by_epoch=True),
            experiment_name='old_model',
        )
    )
    cfg.dump(folder / 'config.py')
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.save_checkpoint(str(folder), 'model.pth', save_optimizer=False, save_param_scheduler=False)


@pytest.fixture(scope='module')
def yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page is followed: the old model, and photographs of the new classes, no old one drawn."""
    voc, place = shared_path('data/voc_mini'), tmp_path_factory.mktemp('photographs')
    folder = lay_out(place / 'yard')
    old_numbers = {number: place for place, number in enumerate(OLD, start=1)}
    write_split(pairs(voc, 'train'), old_numbers, place / 'elsewhere', 'train', set(OLD))
    train_old_model(folder / 'old', place / 'elsewhere', shared_path('weights/mit_b0.pth'))
    write_split(pairs(voc, 'train'), NEW, folder / 'data/yard', 'train', set(NEW))
    write_split(pairs(voc, 'val'), NEW | DRAWN_OLD, folder / 'data/yard', 'val', set(NEW) | set(OLD))
    in_page = re.search(r'by\s+`(model = dict\(backbone=.*?\))`', PAGE.read_text())[1]
    text = (folder / 'yard.py').read_text().splitlines()
    (folder / 'yard.py').write_text('\n'.join([*text[:-1], in_page]) + '\n')
    return folder


def follow(yard: Path, work_dir: str) -> tuple[float, float, float]:
    """The page's command; mean IoU of the old classes before and after, and of the new ones."""
    start = time.perf_counter()
    numbers = [f'mask_values.{name}={101 + place}' for place, name in enumerate(NAMES)]
    (command,) = (line for line in commands(PAGE) if line.startswith('mmseg-sats train'))
    words = shlex.split(command.replace('work_dirs/yard', work_dir))
    done = run(*words, '--cfg-options', *OPTIONS, *numbers, cwd=yard, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stages = json.loads((yard / work_dir / 'results.json').read_text())['stages']
    seconds = time.perf_counter() - start
    ious = [stage['iou'] for stage in stages]
    before, after = (sum(iou[name] for name in NAMES) / len(NAMES) for iou in ious)
    new = sum(ious[1][name] for name in ('crate', 'pallet', 'forklift')) / 3
    print(
        f'{work_dir}: {seconds:.0f} s, old {before:.1f} -> {after:.1f}, new {new:.1f}, '
        f'background {ious[1]["background"]:.1f}'
    )
    return before, after, new


@pytest.mark.slow
def test_without_an_old_image(yard: Path) -> None:
    before, after, new = follow(yard, 'work_dirs/none')
    assert after > 0.5 * before
    assert new > 5


def a_few_old_images(voc: Path) -> list[tuple[Path, Path]]:
    """Four training images of each old class, none of a new one."""
    taken: dict[int, list[tuple[Path, Path]]] = {number: [] for number in OLD}
    for pair in pairs(voc, 'train'):
        labels = set(np.unique(read_mask(pair[1])).tolist())
        wanted = [c for c in OLD if c in labels and len(taken[c]) < 4]
        if wanted and not labels & set(NEW):
            taken[wanted[0]].append(pair)
    return [pair for found in taken.values() for pair in found]


@pytest.mark.slow
def test_a_few_old_images_keep_the_old_classes(yard: Path) -> None:
    few = a_few_old_images(shared_path('data/voc_mini'))
    assert write_split(few, DRAWN_OLD, yard / 'data/yard', 'train', set(OLD)) == 20
    with (yard / 'yard.py').open('a') as config:
        config.write(code_blocks(PAGE, 'python')[1])
    before, after, new = follow(yard, 'work_dirs/few')
    assert after > 0.9 * before
    assert new > 5
