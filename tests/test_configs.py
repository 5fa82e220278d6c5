# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Every config under configs/: its words reach every stage, every stage's model and data set build.

Of a long protocol the first stage, the second and the last are looked at: the others differ from the second by
the number of classes alone. Every method is built with one recipe, and every recipe with one method, for a method's
file and a recipe's are the same in all configs. What two of them share is made once.
"""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets import voc
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS, MODELS
from torch import nn

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.datasets.shapes.drawing import scene_classes
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.protocol import Protocol, Stage

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(
    path for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_' and path.stem != path.parent.name
)
FOLDERS = sorted({path.parent.name for path in FILES})
NUM_CLASSES = {'voc': 20, 'voc_mini': 20, 'ccp_mini': 30, 'ade20k': 150, 'cityscapes': 19}
OVERRIDES = dict(data_root='/other/root', epochs=17, crop_size=160, batch_size=5, seed=123)


def short(path: Path) -> str:
    return f'{path.parent.name}/{path.stem}'


def protocol_of(cfg: Config) -> Protocol:
    classes = cfg.num_shapes if cfg.dataset == 'shapes' else NUM_CLASSES[cfg.dataset]
    return Protocol(cfg.protocol, classes, cfg.class_order, cfg.split)


def said(path: Path) -> tuple[str, ...]:
    """What a config's file says beside its bases, protocol, setting and memory."""
    lines = [ast.unparse(node) for node in ast.parse(path.read_text()).body[1:]]
    return tuple(line for line in lines if not re.match('protocol|split|setting|memory', line))


def one_of_each_kind() -> list[Path]:
    """Every method, every recipe, every data set with every protocol, and every config that says more."""
    kinds: dict[Any, Path] = {}
    for path in sorted(FILES, key=lambda path: path.parent.name != 'sats'):
        recipe, _, ending = re.split(r'_(\d+-\d+)', path.stem)
        for kind in (path.stem, (recipe, ending), (path.parent.name, recipe, said(path)) if said(path) else path.stem):
            kinds.setdefault(kind, path)
    return sorted({*kinds.values(), *(path for path in FILES if path.stem == 'segformer_b2_voc_15-1')})


BUILT = one_of_each_kind()


@functools.cache
def read(path: Path) -> Config:
    return Config.fromfile(path)


@functools.cache
def stages_of(path: Path) -> list[tuple[Stage, Config]]:
    """The first stage, the second and the last, with their configs under ``OVERRIDES``."""
    cfg = read(path)
    changed = Config(cfg._cfg_dict.to_dict())
    changed.merge_from_dict(OVERRIDES)
    protocol = protocol_of(cfg)
    stages = protocol.stages[:2] + protocol.stages[2:][-1:]
    return [(stage, build_stage_config(changed, protocol, stage, 'work_dirs/run')) for stage in stages]


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


@pytest.mark.parametrize('path', BUILT, ids=short)
def test_overrides_reach_every_stage(path: Path) -> None:
    dataset = read(path).dataset
    for _, stage_cfg in stages_of(path):
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
        assert crops or dataset == 'shapes'
        assert stage_cfg.train_dataloader.batch_size == 5
        assert stage_cfg.randomness.seed == 123
        assert words_left(values) == []


def stage_dataset(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of the stage's own images; what may wrap it wants files of the stage before."""
    if cfg['type'] == 'IncrementalDataset':
        return cfg
    assert cfg['type'] in DATASETS
    (inner,) = [part for part in cfg.values() if isinstance(part, dict) and part['type'] == 'IncrementalDataset']
    return inner


@pytest.fixture(scope='module')
def without_files() -> Iterator[None]:
    """PascalVOCDataset wants its folders when it is built, before anybody reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voc, 'fileio', SimpleNamespace(exists=lambda *_: True))
        patch.setattr(voc, 'osp', SimpleNamespace(isfile=lambda _: True))
        yield


@pytest.mark.parametrize('path', BUILT, ids=short)
@pytest.mark.usefixtures('without_files')
def test_the_data_sets_of_every_stage_resolve(path: Path) -> None:
    init_default_scope('mmseg')
    for stage, stage_cfg in stages_of(path):
        for loader in (stage_cfg.train_dataloader, stage_cfg.test_dataloader):
            dataset = DATASETS.build(dict(stage_dataset(loader.dataset), lazy_init=True))
            assert dataset.stage == stage
            assert len(dataset.metainfo['classes']) == 1 + len(stage.seen)


@pytest.fixture(scope='module')
def build_model() -> Iterator[Callable[[Config], nn.Module]]:
    """Builds models without memory or random numbers, equal ones and equal backbones once."""
    build, linspace = MODELS.build, torch.linspace
    made: dict[str, nn.Module] = {}

    def build_once(cfg: dict[str, Any], *args: Any, **kwargs: Any) -> nn.Module:
        kind = MODELS.get(cfg['type'])
        backbone = 'backbones' in kind.__module__.split('.')
        if not (backbone or issubclass(kind, EncoderDecoder)):
            return build(cfg, *args, **kwargs)
        key = repr(cfg)
        if key not in made:
            made[key] = build(cfg, *args, **kwargs)
        # Another method's model may have frozen it.
        return made[key].requires_grad_() if backbone else made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODELS, 'build', build_once)
        # Transformers read their drop rates out of a tensor, which must exist for that.
        patch.setattr(torch, 'linspace', functools.partial(linspace, device='cpu'))
        # Drawing numbers for nobody takes half of the time.
        patch.setattr(ConvModule, 'init_weights', lambda _: None)
        with torch.device('meta'):
            yield build_once


@pytest.mark.parametrize('path', BUILT, ids=short)
def test_the_model_of_every_stage_builds_with_its_heads(
    path: Path, build_model: Callable[[Config], nn.Module]
) -> None:
    init_default_scope('mmseg')
    for stage, stage_cfg in stages_of(path):
        model = build_model(stage_cfg.model)
        rows = 1 + len(stage.seen)
        assert model.num_classes == model.out_channels == rows
        for _, head in model._named_heads():
            assert head.conv_seg.out_channels == head.num_classes == rows
        assert (model._old_model_cfg is None) == (stage.index == 0)


# Files and names


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


def configs_of(folder: str) -> list[Path]:
    return [path for path in FILES if path.parent.name == folder]


@pytest.mark.parametrize('folder', FOLDERS)
def test_configs_inherit_over_at_most_three_levels_and_name_their_method(folder: str) -> None:
    for path in configs_of(folder):
        assert 2 <= levels(path) <= 3, path
        method = path.parent / f'{path.parent.name}.py'
        assert method.resolve() in [parent.resolve() for parent in parents_of(path)], path


def test_the_file_name_tells_the_protocol_setting_and_memory() -> None:
    for path in FILES:
        lines = [node for node in ast.parse(path.read_text()).body if isinstance(node.value, ast.Constant)]
        own = {node.targets[0].id: node.value.value for node in lines if isinstance(node, ast.Assign)}
        named = re.search(r'_(\d+-\d+)(_disjoint)?(_m)?(_poly)?$', path.stem)
        assert named[1] == (own.get('split') if own['protocol'] == 'joint' else own['protocol']), path
        assert own.get('setting', 'overlapped') == ('disjoint' if named[2] else 'overlapped'), path
        assert bool(own.get('memory')) == bool(named[3]), path
        assert (own['protocol'] == 'joint') == (path.parent.name == 'joint'), path


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('joint/segformer_tiny_shapes_*.py')), ids=short)
def test_joint_on_shapes_is_trained_for_as_many_iterations_as_a_whole_run(path: Path) -> None:
    joint = read(path)
    run = read(CONFIGS / 'finetune' / path.name)
    scenes = [
        set(scene_classes(index, num_classes=run.num_shapes)) for index in range(run.train_images)
    ]
    stages = [stage.new for stage in Protocol(joint.split, run.num_shapes).stages]
    shown = [sum(not scene.isdisjoint(new) for scene in scenes) for new in stages]
    whole_run = sum(-(-images // run.batch_size) * run.epochs for images in shown)
    an_epoch = -(-run.train_images // joint.batch_size)
    assert whole_run <= joint.epochs * an_epoch < whole_run + an_epoch


@pytest.mark.parametrize('path', BUILT, ids=short)
def test_the_file_name_tells_the_data_set(path: Path) -> None:
    assert f'_{read(path).dataset}_' in path.stem


def test_every_method_folder_has_its_method_file_and_configs() -> None:
    folders = [path for path in CONFIGS.iterdir() if path.is_dir() and path.name != '_base_']
    assert {'sats', 'finetune', 'joint'} <= {folder.name for folder in folders}
    for folder in folders:
        assert (folder / f'{folder.name}.py').is_file()
        assert any(path.parent == folder for path in FILES), folder


def test_every_recipe_has_a_config_or_a_page() -> None:
    used = {parent.resolve() for path in FILES for parent in parents_of(path)}
    pages = ''.join(page.read_text() for page in CONFIGS.parent.glob('docs/*.md'))
    recipes = set((CONFIGS / '_base_').glob('*.py')) - set((CONFIGS / '_base_').glob('default_*.py'))
    assert [path.name for path in recipes - used if f'_base_/{path.name}' not in pages] == []


# ADE20K


def test_order_b_of_ade20k_is_a_permutation_that_the_protocols_take() -> None:
    cfg = read(CONFIGS / 'sats' / 'segformer_b2_ade20k_100-10.py')
    order = list(cfg.class_order_b)
    assert sorted(order) == list(range(1, 151))
    stages = Protocol('100-10', 150, order).stages
    assert stages[1].new == (11, 16, 50, 64, 66, 73, 89, 92, 145, 146)
    assert stages[5].new == (17, 20, 59, 68, 83, 94, 102, 122, 127, 137)
