# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""One config becomes one per stage: words, merges, sizes and names; and every config of the project does."""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.engine.stage_config import (
    STAGE_WORDS,
    build_stage_config,
    config_words,
    resolve_words,
    stage_dir,
)
from mmseg_sats.protocol import Protocol

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(
    path for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_' and path.stem != path.parent.name
)
NUM_CLASSES = {'voc': 20, 'voc_mini': 20, 'shapes': 6}


def short(path: Path) -> str:
    return f'{path.parent.name}/{path.stem}'


def protocol_of(cfg: Config) -> Protocol:
    return Protocol(cfg.protocol, NUM_CLASSES[cfg.dataset], cfg.class_order, cfg.split)


def stage_configs(cfg: Config, work_dir: str = 'work_dirs/run') -> list[Config]:
    protocol = protocol_of(cfg)
    return [build_stage_config(cfg, protocol, stage, work_dir) for stage in protocol.stages]


# Words


def test_words_resolve_anywhere() -> None:
    value = dict(
        plain='$size', nested=[dict(a='$name'), ('$size', ['$size'])], other='no $word', number=3, none=None,
        price='$', escaped='$size px',
    )
    resolved = resolve_words(value, dict(size=(4, 5), name='x'))
    assert resolved == dict(
        plain=(4, 5), nested=[dict(a='x'), ((4, 5), [(4, 5)])], other='no $word', number=3, none=None,
        price='$', escaped='$size px',
    )
    assert isinstance(resolved['nested'][1], tuple)
    assert value['plain'] == '$size'


def test_a_word_may_stand_for_anything_with_words_in_it() -> None:
    words = dict(
        pipeline=[dict(type='Crop', size='$crop'), '$last'], crop='$size', size=7, last=dict(type='$name'),
        name='Pack', nothing=None,
    )
    assert resolve_words(dict(a='$pipeline', b='$nothing'), words) == dict(
        a=[dict(type='Crop', size=7), dict(type='Pack')], b=None
    )


def test_places_that_name_the_same_word_do_not_share_it() -> None:
    resolved = resolve_words(dict(a='$norm', b='$norm'), dict(norm=dict(type='BN')))
    resolved['a']['type'] = 'SyncBN'
    assert resolved['b'] == dict(type='BN')


def test_an_undefined_word_names_its_place_and_a_near_match() -> None:
    config = dict(model=dict(heads=[dict(size=1), dict(size='$crop_sise')]))
    with pytest.raises(KeyError) as error:
        resolve_words(config, dict(crop_size=3, epochs=2))
    message = str(error.value)
    assert "model.heads[1].size='$crop_sise'" in message
    assert "did you mean 'crop_size'?" in message
    assert "['crop_size', 'epochs']" in message


def test_an_undefined_word_behind_another_names_the_place_where_it_is_wanted() -> None:
    with pytest.raises(KeyError, match=r"a\.b='\$missing'"):
        resolve_words(dict(a=dict(b='$outer')), dict(outer='$missing'))


def test_a_word_that_stands_for_itself_is_refused() -> None:
    with pytest.raises(KeyError, match=r"x='\$epochs' stands for itself"):
        resolve_words(dict(x='$epochs'), dict(epochs='$epochs'))


@pytest.mark.parametrize(('size', 'crop', 'scale'), [(64, (64, 64), (256, 64)), ([48, 96], (48, 96), (384, 48))])
def test_the_crop_size_is_height_and_width(size: Any, crop: tuple, scale: tuple) -> None:
    words = config_words(Config(dict(crop_size=size, other=1)))
    assert words['crop_size'] == crop
    assert words['crop_scale'] == scale
    assert words['other'] == 1
    assert 'crop_scale' not in config_words(Config(dict(other=1)))


# Stages


def test_the_stage_knows_sizes_and_predecessors(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats')
    for index, stage_cfg in enumerate(stage_configs(cfg, '/w/run')):
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
            assert stage_cfg.model.old_model == dict(checkpoint=before, num_classes=3 + index)
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


def test_stage_words_reach_any_place(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('sats', crop_size=32)
    cfg.note = dict(words=[f'${name}' for name in STAGE_WORDS])
    notes = [c.note['words'] for c in stage_configs(cfg)]
    assert notes[0] == [0, 4, 1, (128, 32), (32, 32)]
    assert notes[3] == [3, 7, 6, (128, 32), (32, 32)]


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


def test_an_undefined_word_of_a_config_is_named(shapes_cfg: Callable[..., Config]) -> None:
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


# Top-level words of every config


def find(value: Any, key: str) -> Iterator[Any]:
    """All values at ``key``, at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from find(item, key)


def words_left(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [word for item in value for word in words_left(item)]
    return [value] if isinstance(value, str) and re.match(r'\$\w', value) else []


@pytest.mark.parametrize('path', FILES, ids=short)
def test_overrides_reach_every_stage(path: Path) -> None:
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(dict(data_root='/other/root', epochs=17, crop_size=160, batch_size=5, seed=123))
    for stage_cfg in stage_configs(cfg):
        values = stage_cfg._cfg_dict.to_dict()
        assert {root for part in ('train_dataloader', 'test_dataloader')
                for root in find(values[part], 'data_root')} == {'/other/root'}
        assert stage_cfg.train_cfg.max_epochs == 17
        for scheduler in stage_cfg.param_scheduler:
            # An exponential decay has no end.
            assert scheduler.get('end', 17) == 17
        assert stage_cfg.model.data_preprocessor.size == (160, 160)
        crops = list(find(values['train_dataloader'], 'crop_size'))
        assert all(crop == (160, 160) for crop in crops)
        assert crops or cfg.dataset == 'shapes'
        assert stage_cfg.train_dataloader.batch_size == 5
        assert stage_cfg.randomness.seed == 123
        assert words_left(values) == []


# Every config of the project


def parents_of(path: Path) -> list[Path]:
    """The ``_base_`` files of a config, read as text."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_base_':
            names = ast.literal_eval(node.value)
            return [path.parent / name for name in ([names] if isinstance(names, str) else names)]
    return []


def levels(path: Path) -> int:
    assert path.is_file(), path
    return 1 + max((levels(parent) for parent in parents_of(path)), default=0)


@pytest.mark.parametrize('path', FILES, ids=short)
def test_configs_inherit_over_at_most_three_levels_and_name_their_method(path: Path) -> None:
    assert 2 <= levels(path) <= 3
    method = path.parent / f'{path.parent.name}.py'
    assert method.resolve() in [parent.resolve() for parent in parents_of(path)]


@pytest.mark.parametrize('path', FILES, ids=short)
def test_the_file_name_tells_the_protocol(path: Path) -> None:
    cfg = Config.fromfile(path)
    named = re.search(r'_(\d+-\d+)(_disjoint)?(_m)?$', path.stem)
    assert named[1] == (cfg.split if cfg.protocol == 'joint' else cfg.protocol)
    assert cfg.setting == ('disjoint' if named[2] else 'overlapped')
    assert bool(cfg.memory) == bool(named[3])
    assert f'_{cfg.dataset}_' in path.stem
    assert (cfg.protocol == 'joint') == (path.parent.name == 'joint')


def test_every_method_folder_has_its_method_file_and_configs() -> None:
    folders = [path for path in CONFIGS.iterdir() if path.is_dir() and path.name != '_base_']
    assert {'sats', 'finetune', 'joint'} <= {folder.name for folder in folders}
    for folder in folders:
        assert (folder / f'{folder.name}.py').is_file()
        assert any(path.parent == folder for path in FILES), folder


@pytest.fixture
def meta_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Builds models without memory or random numbers."""
    # The Mix Transformer reads its drop rates out of a tensor, which must exist for that.
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    with torch.device('meta'):
        yield


@pytest.mark.parametrize('path', FILES, ids=short)
@pytest.mark.usefixtures('meta_device')
def test_the_model_of_every_stage_builds_with_its_head(path: Path) -> None:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    protocol = protocol_of(cfg)
    depth = list(cfg.model.backbone.num_layers)
    for stage, stage_cfg in zip(protocol.stages, stage_configs(cfg), strict=True):
        if 0 < stage.index < len(protocol.stages) - 1:
            # Depth is the same in all stages; the first and the last are built as they are.
            stage_cfg.model.backbone.num_layers = [1, 1, 1, 1]
        model = MODELS.build(stage_cfg.model)
        head = model.decode_head
        assert head.conv_seg.out_channels == head.num_classes == model.num_classes
        assert head.num_classes == model.out_channels == 1 + len(stage.seen)
        assert (model._old_model_cfg is None) == (stage.index == 0)
    assert [len(layer[1]) for layer in model.backbone.layers] == depth
