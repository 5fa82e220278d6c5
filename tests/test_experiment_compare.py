# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which configs make the same run, and which share a stage 0."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmseg.registry import MODELS
from torch import nn

from mmseg_sats.engine.experiments.compare import (
    Fingerprint,
    comparable_values,
    differences,
    explain,
    fingerprint,
    same_start,
)
from mmseg_sats.engine.experiments.cross_entropy_alike import as_plain

CONFIGS = Path(__file__).parents[1] / 'configs'
FREEZING = dict(custom_hooks=[dict(type='FreezingHookOfATest')])


@HOOKS.register_module()
class FreezingHookOfATest(Hook):
    """A hook from outside the package, which may change anything."""


@MODELS.register_module()
class LossWithoutTeacher(nn.Module):
    """A part of the distillation that is computed in stage 0 too."""

    needs_teacher = False


def make(method: str = 'sats', protocol: str = '15-1', seeded: bool = False, **options: Any) -> Fingerprint:
    """The fingerprint of a voc_mini config; 20 classes, so that no data is needed."""
    if not options:
        return plain(method, protocol, seeded)
    cfg = copy.deepcopy(read(method, protocol))
    cfg.merge_from_dict(options)
    return fingerprint(cfg, num_classes=20, seeded_start=seeded)


@functools.cache
def read(method: str, protocol: str) -> Config:
    cfg = Config.fromfile(CONFIGS / method / f'segformer_b0_voc_mini_{protocol}.py')
    cfg.setdefault('method', method)
    return cfg


@functools.cache
def plain(method: str, protocol: str, seeded: bool) -> Fingerprint:
    """That of a config as it is."""
    return fingerprint(copy.deepcopy(read(method, protocol)), num_classes=20, seeded_start=seeded)


def test_what_chooses_the_epoch_of_stage_0_is_part_of_its_start() -> None:
    evaluated_otherwise = dict(eval_pipeline='$centre_crop_pipeline', eval_images='all')
    assert same_start(make(), make(**evaluated_otherwise))
    assert not same_start(make(), make(held_out=0.2))
    assert same_start(make(held_out=0.2), make(held_out=0.2, protocol='15-5'))
    assert not same_start(make(held_out=0.2), make(held_out=0.2, **evaluated_otherwise))


def test_the_same_config_is_the_same_run() -> None:
    again = fingerprint(copy.deepcopy(read('sats', '15-1')), num_classes=20, seeded_start=False)
    assert explain(make(), again) == ''
    assert make().num_stages == 6
    assert make(protocol='10-1').num_stages == 11


@pytest.mark.parametrize(
    'options',
    [
        dict(num_workers=7, persistent_workers=False),
        {'test_dataloader.timeout': 60},
        {'default_hooks.logger.interval': 3},
        dict(data_root='/elsewhere/voc_mini', pretrained='/elsewhere/mit_b0.pth', work_dir='w'),
        dict(log_level='DEBUG', resume=True, launcher='pytorch'),
        dict(train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs='$epochs')),
        dict(a_word_that_came_later=3),
        {'train_dataloader.dataset.cache_dir': None},
        {'train_dataloader.drop_last': False},
        dict(custom_hooks=[]),
        {'model.graph_old_model': True},
    ],
    ids=str,
)
def test_what_changes_no_figure(options: dict[str, Any]) -> None:
    assert explain(make(**options), make()) == ''
    assert explain(make(), make(**options)) == ''
    assert same_start(make(**options), make())


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(epochs=3), 'epochs: 6 there, 3 asked'),
        (dict(lr=1.0), 'lr: 0.0004 there, 1.0 asked'),
        ({'later_stages.lr': 1.0}, 'later_stages.lr: 0.0001 there, 1.0 asked'),
        (dict(seed=3), 'seed: 0 there, 3 asked'),
        (dict(memory=40), 'memory: 0 there, 40 asked'),
        (dict(setting='disjoint'), "setting: 'overlapped' there, 'disjoint' asked"),
        (dict(crop_size=96), 'crop_size: 160 there, 96 asked'),
        (dict(pretrained='mit_b5.pth'), "pretrained: 'mit_b0.pth' there, 'mit_b5.pth' asked"),
        (dict(train_list='x/fit.txt'), "train_list: 'train.txt' there, 'fit.txt' asked"),
        ({'distillation.attention.loss_weight': 5.0}, 'loss_weight: 20.0 there, 5.0 asked'),
        (dict(pseudo_labeler=None), "pseudo_labeler.type: 'EntropyPseudoLabeler' there, absent asked"),
        (dict(eval_future='ignore'), "eval_future: 'background' there, 'ignore' asked"),
        (dict(load_from='x/start.pth'), "load_from: None there, 'start.pth' asked"),
        (dict(sync_bn='torch'), "sync_bn: None there, 'torch' asked"),
        ({'test_cfg.fp16': True}, 'test_cfg.fp16: absent there, True asked'),
        (FREEZING, 'custom_hooks.FreezingHookOfATest.type: absent there, True asked'),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_another_run(options: dict[str, Any], expected: str) -> None:
    text = explain(make(), make(**options))
    assert expected in text
    assert text.count('there') <= 4


def test_a_difference_is_told_once() -> None:
    assert explain(make(), make(epochs=3)) == 'epochs: 6 there, 3 asked'


def test_accepted_paths_do_not_count() -> None:
    other = make(epochs=3)
    paths = ['train_cfg.max_epochs', 'param_scheduler']
    assert explain(make(), other, ['train_cfg.max_epochs']) != ''
    assert explain(make(), other, paths) == ''
    assert explain(make(), make(epochs=3, lr=1.0), paths) != ''
    assert explain(make(), other, ['train_cfg.max']) != ''  # whole words of the path


@pytest.mark.parametrize(
    'other',
    [
        dict(method='finetune'),
        dict(protocol='15-5'),
        dict(memory=40),
        dict(seed=5),
        {'distillation.attention': None},
        {'pseudo_labeler': None, 'distillation.output.loss_weight': 3.0},
        {'later_stages.lr': 1.0},
        {'later_stages.model.backbone.drop_path_rate': 0.5},
        # MiB's loss is cross-entropy while there are no old classes.
        dict(segmentation_loss=dict(
            _delete_=True, type='UnbiasedCrossEntropyLoss', num_old='$num_old')),
        dict(eval_future='ignore'),
    ],
    ids=str,
)
def test_what_matters_only_later_leaves_stage_0_shared(other: dict[str, Any]) -> None:
    assert same_start(make(), make(**other))
    assert explain(make(), make(**other)) != ''


@pytest.mark.parametrize(
    'other',
    [
        dict(method='joint'),
        dict(protocol='10-1'),
        dict(epochs=7),
        dict(lr=1.0),
        dict(pretrained='mit_b5.pth'),
        dict(segmentation_loss=dict(use_sigmoid=True)),
        dict(segmentation_loss=dict(loss_weight=2.0)),
        dict(segmentation_loss=dict(avg_non_ignore=True)),
        dict(segmentation_loss=dict(class_weight=[0.5] + 20 * [1.0])),
        dict(segmentation_loss=dict(_delete_=True, type='UnbiasedCrossEntropyLoss', num_old=3)),
        dict(segmentation_loss=dict(_delete_=True, type='DiceLoss')),
        dict(class_order=[*range(2, 21), 1]),
        dict(setting='disjoint'),
        FREEZING,
        {'model.decode_head.channels': 64},
        {'distillation.sparsity': dict(type='LossWithoutTeacher', weight=0.1)},
    ],
    ids=str,
)
def test_another_stage_0(other: dict[str, Any]) -> None:
    assert not same_start(make(), make(**other))


def test_joint_shares_over_protocols_but_not_over_seeds() -> None:
    one, other = make('joint', '15-1'), make('joint', '10-1')
    assert same_start(one, other)
    assert explain(one, other) != ''  # reported with another split
    assert not same_start(one, make('joint', '15-1', seed=1))


def test_seeds_may_have_a_stage_0_each() -> None:
    assert not same_start(make(seeded=True), make(seeded=True, seed=1))
    assert same_start(make(seeded=True), make('finetune', seeded=True))


def test_a_loss_that_is_cross_entropy() -> None:
    plain = as_plain(dict(type='CrossEntropyLoss', loss_weight=0.4), 3)
    assert plain == as_plain(dict(type='UnbiasedCrossEntropyLoss', num_old=1, loss_weight=0.4), 3)
    assert plain == dict(type='cross-entropy', weight=0.4)
    other = dict(type='UnbiasedCrossEntropyLoss', num_old=2)
    assert as_plain(other, 3) == other
    assert as_plain(dict(type='NoLoss'), 3) == dict(type='NoLoss')


def test_flat_configs() -> None:
    value = dict(a=[dict(b=1), 2], c=dict(), d='x/y/z.txt', e=(), train_cfg=dict(type='T', by_epoch=True))
    assert comparable_values(value) == {'a.0.b': 1, 'a.1': 2, 'c': {}, 'd': 'z.txt', 'e': None}


def test_absent_and_empty_are_the_same_but_empty_and_full_are_not() -> None:
    assert differences(dict(a=None, b=0), dict(c='')) == {}
    assert differences(dict(a=0), dict(a=2)) == {'a': '0 there, 2 asked'}
    assert differences(dict(), dict(a=2)) == {'a': 'absent there, 2 asked'}


def test_a_class_order_may_be_the_name_of_one() -> None:
    cfg = Config.fromfile(CONFIGS / 'finetune/segformer_b2_ade20k_100-10.py')
    spelt = copy.deepcopy(cfg)
    cfg.merge_from_dict({'class_order': '$class_order_b'})
    spelt.merge_from_dict({'class_order': list(cfg.class_order_b)})
    named, listed = fingerprint(cfg, num_classes=150), fingerprint(spelt, num_classes=150)
    assert same_start(named, listed)
    assert not same_start(named, fingerprint(Config.fromfile(cfg.filename), num_classes=150))
