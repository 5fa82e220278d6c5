# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""One config becomes one per stage: words, merges, sizes and names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.engine.config.stage_config import (
    build_stage_config,
    check_pretrained,
    stage_dir,
)
from mmseg_sats.engine.config.variables import STAGE_VARIABLES, config_variables, resolve_variables
from mmseg_sats.protocol import Protocol

CONFIGS = Path(__file__).parents[1] / 'configs'
NUM_CLASSES = {'voc': 20, 'shapes': 6}


def protocol_of(cfg: Config) -> Protocol:
    return Protocol(cfg.protocol, NUM_CLASSES[cfg.dataset], cfg.class_order, cfg.split)


def stage_configs(cfg: Config, work_dir: str = 'work_dirs/run') -> list[Config]:
    protocol = protocol_of(cfg)
    return [build_stage_config(cfg, protocol, stage, work_dir) for stage in protocol.stages]


# Words


def test_variables_resolve_anywhere() -> None:
    value = dict(
        plain='$size', nested=[dict(a='$name'), ('$size', ['$size'])], other='no $word', number=3, none=None,
        price='$', escaped='$size px',
    )
    resolved = resolve_variables(value, dict(size=(4, 5), name='x'))
    assert resolved == dict(
        plain=(4, 5), nested=[dict(a='x'), ((4, 5), [(4, 5)])], other='no $word', number=3, none=None,
        price='$', escaped='$size px',
    )
    assert isinstance(resolved['nested'][1], tuple)
    assert value['plain'] == '$size'


def test_a_variable_may_stand_for_anything_with_variables_in_it() -> None:
    words = dict(
        pipeline=[dict(type='Crop', size='$crop'), '$last'], crop='$size', size=7, last=dict(type='$name'),
        name='Pack', nothing=None,
    )
    assert resolve_variables(dict(a='$pipeline', b='$nothing'), words) == dict(
        a=[dict(type='Crop', size=7), dict(type='Pack')], b=None
    )


def test_places_that_name_the_same_variable_do_not_share_it() -> None:
    resolved = resolve_variables(dict(a='$norm', b='$norm'), dict(norm=dict(type='BN')))
    resolved['a']['type'] = 'SyncBN'
    assert resolved['b'] == dict(type='BN')


def test_an_undefined_variable_names_its_place_and_a_near_match() -> None:
    config = dict(model=dict(heads=[dict(size=1), dict(size='$crop_sise')]))
    with pytest.raises(KeyError) as error:
        resolve_variables(config, dict(crop_size=3, epochs=2))
    message = str(error.value)
    assert "model.heads[1].size='$crop_sise'" in message
    assert "did you mean 'crop_size'?" in message
    assert "['crop_size', 'epochs']" in message


def test_an_undefined_variable_behind_another_names_the_place_where_it_is_wanted() -> None:
    with pytest.raises(KeyError, match=r"a\.b='\$missing'"):
        resolve_variables(dict(a=dict(b='$outer')), dict(outer='$missing'))


def test_a_variable_that_stands_for_itself_is_refused() -> None:
    with pytest.raises(KeyError, match=r"x='\$epochs' stands for itself"):
        resolve_variables(dict(x='$epochs'), dict(epochs='$epochs'))


@pytest.mark.parametrize(('size', 'crop', 'scale'), [(64, (64, 64), (256, 64)), ([48, 96], (48, 96), (384, 48))])
def test_the_crop_size_is_height_and_width(size: Any, crop: tuple, scale: tuple) -> None:
    words = config_variables(Config(dict(crop_size=size, other=1)))
    assert words['crop_size'] == crop
    assert words['crop_scale'] == scale
    assert words['crop_wh'] == crop[::-1]
    assert words['other'] == 1
    assert 'crop_scale' not in config_variables(Config(dict(other=1)))


# Stages


def test_the_stage_knows_sizes_and_predecessors(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats', resume=True)
    for index, stage_cfg in enumerate(stage_configs(cfg, '/w/run')):
        assert not stage_cfg.resume  # without a checkpoint of its own it starts afresh
        assert stage_cfg.model.decode_head.num_classes == 4 + index
        assert stage_cfg.train_dataloader.dataset.stage == index
        assert stage_cfg.test_dataloader.dataset.stage == index
        assert stage_cfg.work_dir == f'/w/run/stage_{index}'
        before = f'/w/run/stage_{index - 1}/snapshot.pth'
        if index == 0:
            assert stage_cfg.load_from is None
            assert 'old_model' not in stage_cfg.model
        else:
            assert stage_cfg.load_from == before
            assert stage_cfg.model.old_model == dict(checkpoint=before, num_old=3 + index)
    assert stage_dir('/w/run', 2) == Path('/w/run/stage_2')


def test_names_are_distinct_per_stage_and_run(shapes_cfg: Callable[..., Config]) -> None:
    configs = [c for run in ('a/x', 'b/x') for c in stage_configs(shapes_cfg('sats'), run)]
    for names in (
        [(c.work_dir, c.experiment_name) for c in configs],
        [c.visualizer.name for c in configs],
        [c.work_dir for c in configs],
    ):
        assert len(set(names)) == len(configs) == 8


def test_a_stage_config_leaves_the_runs_config_alone(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats')
    before = cfg.pretty_text
    stage_configs(cfg)
    assert cfg.pretty_text == before


def test_stage_variables_reach_any_place(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats', crop_size=32)
    cfg.note = dict(words=[f'${name}' for name in STAGE_VARIABLES])
    notes = [c.note['words'] for c in stage_configs(cfg)]
    assert notes[0] == [0, 4, 1, 3, (128, 32), (32, 32)]
    assert notes[3] == [3, 7, 6, 0, (128, 32), (32, 32)]


def test_initial_and_later_stages_are_merged_where_they_belong(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats', epochs=1)
    cfg.merge_from_dict(
        dict(
            initial_stage=dict(epochs=7, model=dict(backbone=dict(drop_path_rate=0.3))),
            later_stages=dict(lr=0.5, model=dict(decode_head=dict(dropout_ratio=0.4))),
        )
    )
    first, second, *_ = stage_configs(cfg)
    assert first.train_cfg.max_epochs == first.param_scheduler[0].end == 7
    assert second.train_cfg.max_epochs == 1
    assert first.model.backbone.drop_path_rate == 0.3
    assert second.model.backbone.drop_path_rate == 0.0
    assert first.optim_wrapper.optimizer.lr == 2e-3
    assert second.optim_wrapper.optimizer.lr == 0.5
    assert first.model.decode_head.dropout_ratio == 0.1
    assert second.model.decode_head.dropout_ratio == 0.4
    assert not {'initial_stage', 'later_stages', 'runner_type'} & set(first)


def test_a_method_has_stage_parts_of_its_own_and_the_recipe_wins(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('finetune')
    cfg.merge_from_dict(
        dict(
            method_initial_stage=dict(epochs=5, seed=9),
            method_later_stages=dict(lr=0.7, model=dict(frozen=('backbone',))),
            initial_stage=dict(epochs=7),
            later_stages=dict(lr=0.5),
        )
    )
    first, second, *_ = stage_configs(cfg)
    assert (first.epochs, first.seed, 'frozen' in first.model) == (7, 9, False)
    assert (second.lr, second.model.frozen) == (0.5, ('backbone',))
    assert not [key for key in second if key.startswith('method_')]


def test_all_auxiliary_heads_get_the_stages_size(shapes_cfg: Callable[..., Config]) -> None:
    head = dict(type='FCNHead', num_classes=99)
    for auxiliary in (head, [head, dict(head)]):
        cfg = shapes_cfg('sats')
        cfg.model.auxiliary_head = auxiliary
        for stage_cfg in stage_configs(cfg):
            heads = stage_cfg.model.auxiliary_head
            sizes = [each.num_classes for each in (heads if isinstance(heads, list) else [heads])]
            assert set(sizes) == {stage_cfg.model.decode_head.num_classes}


def test_weights_start_from_imagenet_only_in_stage_0(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats', pretrained='mit.pth')
    starts = [c.model.backbone.init_cfg for c in stage_configs(cfg)]
    assert starts == [dict(type='Pretrained', checkpoint='mit.pth'), None, None, None]
    cfg = shapes_cfg('sats', pretrained=None)
    assert stage_configs(cfg)[0].model.backbone.init_cfg is None


@pytest.mark.parametrize('owner', ['model', 'backbone'])
def test_weights_named_as_mmseg_once_did_are_read_in_stage_0_alone(
    shapes_cfg: Callable[..., Config], owner: str
) -> None:
    cfg = shapes_cfg('sats', pretrained='missing.pth')
    cfg.model.backbone.pop('init_cfg')
    (cfg.model if owner == 'model' else cfg.model.backbone).pretrained = '$pretrained'
    first, *later = stage_configs(cfg)
    named = first.model if owner == 'model' else first.model.backbone
    assert named.pretrained == 'missing.pth'
    with pytest.raises(FileNotFoundError, match=r'missing\.pth do not exist'):
        check_pretrained(first)
    for stage_cfg in later:
        assert 'pretrained' not in stage_cfg.model
        assert 'pretrained' not in stage_cfg.model.backbone


VIT = dict(type='AttentionVisionTransformer', img_size=(32, 48), embed_dims=8, num_layers=1, num_heads=2)


def test_a_model_zoo_is_left_to_mmengine_and_a_file_is_looked_at(tmp_path: Path) -> None:
    init_default_scope('mmseg')
    resnet = dict(type='ResNetV1c', depth=18, base_channels=4, stem_channels=4)

    def check(backbone: dict, checkpoint: str, **options: Any) -> None:
        init_cfg = dict(type='Pretrained', checkpoint=checkpoint, **options)
        check_pretrained(Config(dict(model=dict(backbone=dict(backbone, init_cfg=init_cfg)))))

    check(resnet, 'open-mmlab://resnet18_v1c')
    with pytest.raises(FileNotFoundError, match=r'r18\.pth do not exist. Convert weights .*model_converters'):
        check(resnet, 'r18.pth')
    path = str(tmp_path / 'weights.pth')
    weights = MODELS.build(resnet).state_dict()
    torch.save(weights | {'fc.weight': torch.zeros(1)}, path)
    check(resnet, path)
    with pytest.raises(ValueError, match=r'weights.pth does not fit AttentionVisionTransformer: .*missing'):
        check(VIT, path)
    # mmseg interpolates the position embedding of another image size while it loads.
    torch.save(MODELS.build(dict(VIT, img_size=(64, 64))).state_dict(), path)
    check(VIT, path)
    with pytest.raises(ValueError, match=r'patch_embed.*\(8, 3, 16, 16\) in the checkpoint'):
        check(dict(VIT, patch_size=8), path)
    # A few tensors may be missing.
    torch.save(dict(list(weights.items())[3:]), path)
    check(resnet, path)
    # Of a whole segmentor's weights, the prefix says which are the encoder's.
    torch.save({f'backbone.{name}': weight for name, weight in weights.items()}, path)
    check(resnet, path, prefix='backbone.')
    with pytest.raises(ValueError, match='does not fit ResNetV1c'):
        check(resnet, path)


def test_an_undefined_variable_of_a_config_is_named(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats')
    cfg.train_dataloader.batch_size = '$batchsize'
    with pytest.raises(KeyError, match=r"train_dataloader\.batch_size='\$batchsize'.*'batch_size'"):
        stage_configs(cfg)


def test_a_stage_config_is_read_back_from_its_file(tmp_path: Path) -> None:
    cfg = Config.fromfile(CONFIGS / 'sats' / 'segformer_b2_voc_15-1.py')
    for stage_cfg in stage_configs(cfg)[:2]:
        path = tmp_path / 'config.py'
        path.write_text(stage_cfg.pretty_text)
        assert Config.fromfile(path)._cfg_dict.to_dict() == stage_cfg._cfg_dict.to_dict()


def test_parameters_share_groups_unless_a_constructor_is_named() -> None:
    cfg = Config.fromfile(CONFIGS / 'sats/segformer_tiny_shapes_3-1.py')
    for stage in stage_configs(cfg):
        assert stage.optim_wrapper.constructor == 'GroupedOptimWrapperConstructor'
    cfg.optim_wrapper.constructor = 'DefaultOptimWrapperConstructor'
    for stage in stage_configs(cfg):
        assert stage.optim_wrapper.constructor == 'DefaultOptimWrapperConstructor'


@pytest.mark.parametrize(('workers', 'persistent'), [(0, False), (2, True)])
def test_workers_persist_where_there_are_any(
    shapes_cfg: Callable[..., Config], workers: int, persistent: bool
) -> None:
    """torch refuses to keep workers that there are not."""
    for cfg in stage_configs(shapes_cfg('sats', num_workers=workers, persistent_workers=True)):
        assert cfg.train_dataloader.persistent_workers is persistent
