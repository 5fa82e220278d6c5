# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage is as long as its config says, in epochs or iterations, and what is counted with it follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmseg
import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmseg_sats.engine import ResumableTrainLoop
from mmseg_sats.engine.command_line import run_config
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.config.stage_length import notes_on_length
from mmseg_sats.engine.experiments.plan import Run
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.utils.installed import CONFIGS

MakeConfig = Callable[..., Config]
SCHEDULES = Path(mmseg.__file__).parent / '.mim/configs/_base_/schedules'
# What mmseg's schedule of 40k iterations sets.
STOCK = dict(
    optim_wrapper=dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01), clip_grad=None),
    param_scheduler=[dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)],
    train_cfg=dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=4000),
    val_cfg=dict(type='ValLoop'),
    default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4000)),
)
# Of an epoch, as mmseg warms up; then by iteration.
WARM_UP = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=5, by_epoch=False),
    dict(type='PolyLR', begin=5, end='$epochs', by_epoch=False),
    dict(type='MultiStepLR', milestones=[1, 2], by_epoch=True),
]


def stage_configs(cfg: Config) -> list[Config]:
    protocol = build_protocol(cfg)
    return [build_stage_config(cfg, protocol, stage, 'work_dirs/run') for stage in protocol.stages]


def schedule_of(cfg: Config) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    assert cfg.train_cfg.type == 'ResumableTrainLoop'
    ends = [(scheduler.get('end'), scheduler.get('by_epoch')) for scheduler in cfg.param_scheduler]
    return {key: value for key, value in cfg.train_cfg.items() if key != 'type'}, ends


# What a config says, what the command adds, and the loop and the schedules' (end, by_epoch) of stages 0 and 1.
LENGTHS = {
    'epochs, as ever': ({}, {}, (dict(max_epochs=1), [(1, True)]), None),
    'iterations in place of epochs': (dict(iters=40), {}, (dict(max_iters=40), [(40, False)]), None),
    'iterations of the later stages': (
        {}, {'later_stages.iters': 7}, (dict(max_epochs=1), [(1, True)]), (dict(max_iters=7), [(7, False)]),
    ),
    'epochs of the later stages': (
        dict(iters=40, later_stages=dict(epochs=3)), {},
        (dict(max_iters=40), [(40, False)]), (dict(max_epochs=3), [(3, True)]),
    ),
    'epochs by the command': (dict(iters=40), dict(epochs=3), (dict(max_epochs=3), [(3, True)]), None),
    "mmseg's": (STOCK, {}, (dict(max_iters=40000, val_interval=4000), [(40000, False)]), None),
    "mmseg's, shorter": (
        STOCK, {'iters': 400, 'later_stages.iters': 50},
        (dict(max_iters=400, val_interval=40), [(400, False)]), (dict(max_iters=50, val_interval=5), [(50, False)]),
    ),
    "mmseg's, by epochs": (STOCK, dict(epochs=3), (dict(max_epochs=3), [(3, True)]), None),
    "mmseg's, the later stages by epochs": (
        STOCK, {'later_stages.epochs': 2},
        (dict(max_iters=40000, val_interval=4000), [(40000, False)]), (dict(max_epochs=2), [(2, True)]),
    ),
    'a loop without a type': (
        dict(train_cfg=dict(_delete_=True, by_epoch=False, max_iters=9)), {}, (dict(max_iters=9), [(9, False)]), None,
    ),
    "mmengine's epochs": (
        dict(train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=6)), {},
        (dict(max_epochs=6), [(1, True)]), None,
    ),
    'the loop over the word': (
        dict(iters=40), {'train_cfg.max_iters': 9}, (dict(max_iters=9), [(9, False)]), None,
    ),
    'the loop of a part over the word': (
        dict(iters=40, later_stages=dict(train_cfg=dict(max_iters=9))), {},
        (dict(max_iters=40), [(40, False)]), (dict(max_iters=9), [(9, False)]),
    ),
    'a warm-up': (
        dict(iters=40, param_scheduler=WARM_UP), {},
        (dict(max_iters=40), [(5, False), (40, False), (None, True)]), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', LENGTHS)
def test_the_length_of_a_stage(case: str, shapes_cfg: MakeConfig) -> None:
    said, options, first, later = LENGTHS[case]
    cfg = run_config(shapes_cfg('sats', protocol='3-3', **said), options)
    stages = stage_configs(cfg)
    assert [schedule_of(stage) for stage in stages] == [first, later or first]
    for stage, (loop, _) in zip(stages, (first, later or first), strict=True):
        assert 'val_cfg' not in stage
        assert stage.log_processor.by_epoch is ('max_epochs' in loop)
        checkpoint = stage.default_hooks.checkpoint
        if said is STOCK:
            assert (checkpoint.type, 'iters' in checkpoint) == ('CheckpointHook', False)
        elif 'max_iters' in loop:
            assert (checkpoint.by_epoch, checkpoint.interval) == (False, max(1, loop['max_iters'] // 10))
            assert stage.default_hooks.logger.interval == min(50, loop['max_iters'])


REFUSED = {
    'a schedule that begins at an epoch': (
        dict(iters=40, param_scheduler=[dict(type='PolyLR', begin=2, end='$epochs', by_epoch=True)]),
        r'param_scheduler\[0\] begins at an epoch \(2\) .*: expected a begin in iterations and by_epoch=False',
    ),
    'no iteration': (dict(iters=0), 'iters=0: expected a whole number from 1'),
    'half an iteration': (dict(iters=None, train_cfg=dict(max_iters=2.5)), r'max_iters=2.5: expected a whole number'),
    'both': (dict(later_stages=dict(iters='4')), "later_stages.iters='4': expected a whole number from 1"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_an_impossible_length_is_refused_before_training(case: str, shapes_cfg: MakeConfig) -> None:
    said, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        RUNNERS.build(shapes_cfg('finetune', **said))


def test_what_is_read_in_another_way_is_told(shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('sats', **STOCK, train_dataloader=dict(sampler=dict(type='InfiniteSampler')))
    cfg.merge_from_dict({'later_stages.train_cfg.max_iters': 50, 'later_stages.lr': 0.1})
    notes = ' | '.join(notes_on_length(cfg, stage_configs(cfg)))
    for part in (
        'IterBasedTrainLoop: ResumableTrainLoop is used', 'InfiniteSampler: SharedBatchSampler composes',
        'optim_wrapper.optimizer.lr=0.01 is used, lr and later_stages.lr are not',
        'param_scheduler[0] ends at iteration 40000, a stage at 50',
    ):  # fmt: skip
        assert part in notes
    cfg = shapes_cfg('sats', iters=4)
    assert list(notes_on_length(cfg, stage_configs(cfg))) == ['iters=4 is used, epochs=1 is not']
    plain = shapes_cfg('sats')
    assert not list(notes_on_length(plain, stage_configs(plain)))


def test_the_tables_take_the_same_words() -> None:
    run = Run('sats', CONFIGS / 'sats/segformer_tiny_shapes_3-1.py', ('iters=9', 'later_stages.epochs=2'))
    loops = [stage.train_cfg for stage in stage_configs(run.load())]
    assert [(loop.get('max_iters'), loop.get('max_epochs')) for loop in loops] == [(9, None), *[(None, 2)] * 3]


def test_a_loop_has_one_length() -> None:
    for options in ({}, dict(max_epochs=1, max_iters=1)):
        with pytest.raises(ValueError, match=r'ResumableTrainLoop: .* expected one of the two'):
            ResumableTrainLoop(None, None, **options)


@pytest.fixture
def inherited(shapes_root: Path, tmp_path: Path) -> Callable[[str], Config]:
    """Maker of a run whose config inherits a schedule, as it is, beside what is not one."""

    def make(schedule: str, **options: Any) -> Config:
        bases = [f'_base_/{name}.py' for name in ('models/segformer', 'datasets/shapes', 'default_runtime')]
        bases = [*(f'mmseg_sats::{base}' for base in bases), 'mmseg_sats::finetune/finetune.py', schedule]
        path = tmp_path / 'own/run.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'_base_ = {bases}\n'
            "pretrained, protocol = None, '3-3'\n"
            "norm_cfg = dict(_delete_=True, type='BN')\n"
            'model = dict(\n'
            '    backbone=dict(embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.0),\n'
            '    decode_head=dict(in_channels=[16, 32, 64, 128], channels=64))\n'
        )
        small = dict(
            data_root=str(shapes_root), image_size=64, crop_size=64, train_images=24, val_images=12, batch_size=8,
            report=None,
        )  # fmt: skip
        return run_config(path, small | options, work_dir=tmp_path / 'run')

    return make


@pytest.mark.parametrize('name', sorted(path.name for path in SCHEDULES.glob('*.py')))
def test_mmsegs_schedules_are_inherited_as_they_are(name: str, inherited: Callable[..., Config]) -> None:
    cfg = inherited(f'mmseg::_base_/schedules/{name}')
    assert '_scope_' not in cfg.pretty_text
    for stage in stage_configs(cfg):
        assert stage.train_cfg.max_iters == cfg.train_cfg.max_iters >= 20000
        assert stage.param_scheduler[-1].end == cfg.train_cfg.max_iters
        # Of ours, what mmseg's do not name.
        assert stage.default_hooks.finite.type == 'FiniteHook'
        assert stage.default_hooks.checkpoint.type == 'CheckpointHook'
        assert 'val_cfg' not in stage


def test_mmsegs_schedule_trains(inherited: Callable[..., Config], tmp_path: Path) -> None:
    RUNNERS.build(inherited(str(SCHEDULES / 'schedule_40k.py'), iters=4)).train()
    for index in range(2):
        assert (tmp_path / f'run/stage_{index}/iter_4.pth').is_file()
    (log,) = (tmp_path / 'run/stage_1').glob('*/*.log')
    assert 'iteration 4 of 4: ' in (text := log.read_text())
    assert 'Iter(train) [4/4]  lr: 1.0000e-04' in text


def test_our_schedule_of_40k_trains(inherited: Callable[..., Config], tmp_path: Path) -> None:
    cfg = inherited(str(CONFIGS / '_base_/schedules/sgd_40k.py'), iters=5, **{'later_stages.iters': 3})
    whole = inherited(str(CONFIGS / '_base_/schedules/sgd_40k.py'))
    assert [stage.train_cfg.max_iters for stage in stage_configs(whole)] == [40000, 4000]
    assert [stage.default_hooks.checkpoint.interval for stage in stage_configs(whole)] == [4000, 400]
    stock = Config.fromfile(SCHEDULES / 'schedule_40k.py')
    mine = stage_configs(whole)[0]
    assert mine.optim_wrapper.optimizer == stock.optimizer
    assert mine.param_scheduler == stock.param_scheduler
    RUNNERS.build(cfg).train()
    for index, iters in ((0, 5), (1, 3)):
        assert sorted(path.name for path in (tmp_path / f'run/stage_{index}').glob('iter_*.pth')) == [
            f'iter_{iters - 1}.pth', f'iter_{iters}.pth',
        ]  # fmt: skip
