# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Memories and outside images in whole runs of four stages, and what is refused before one."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS

from mmseg_sats.datasets.memory.exemplars import read_exemplars
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.config.replay import check_replay, keep_exemplars
from mmseg_sats.engine.config.stage_config import build_stage_config, stage_dir
from mmseg_sats.engine.hooks.methods.image_pass import training_images_once
from mmseg_sats.protocol import Protocol
from mmseg_sats.utils.shared_values import Sharing
from tests.conftest import CONFIGS
from tests.test_configs import BUILT, short

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def mmseg_scope() -> None:
    init_default_scope('mmseg')


PROTOCOL = Protocol('3-1', 6)
MEMORY = 10
METHODS = sorted(
    path.parent.name
    for path in CONFIGS.glob('*/segformer_tiny_shapes_3-1.py')
    if path.parent.name != 'joint'
)


def stage_cfg(cfg: Config, index: int, work_dir: Path) -> Config:
    return build_stage_config(cfg, PROTOCOL, PROTOCOL.stages[index], work_dir)


def keep_all(cfg: Config, work_dir: Path) -> list[str]:
    """The memory's files after each stage of a run that trains nothing."""
    texts = []
    for stage in PROTOCOL.stages:
        folder = stage_dir(work_dir, stage.index)
        folder.mkdir(parents=True)
        previous = stage_dir(work_dir, stage.index - 1)
        keep_exemplars(stage_cfg(cfg, stage.index, work_dir), stage, folder, previous)
        texts.append((folder / 'exemplars.json').read_text())
    return texts


@pytest.fixture(scope='module')
def finished(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work dir of SATS-M in four stages."""
    work_dir = tmp_path_factory.mktemp('memory') / 'sats'
    cfg = Config.fromfile(CONFIGS / 'sats/segformer_tiny_shapes_3-1_m.py')
    assert cfg.memory == 18
    small = dict(data_root=str(shapes_root), work_dir=str(work_dir), epochs=1, image_size=64, crop_size=64,
                 train_images=24, val_images=12, batch_size=8, memory=MEMORY, report=None)
    cfg.merge_from_dict(small)
    RUNNERS.build(cfg).train()
    return work_dir


def stage_of(work_dir: Path, index: int) -> Config:
    return Config.fromfile(work_dir / f'stage_{index}/config.py')


def test_a_run_keeps_a_balanced_memory_within_its_budget(finished: Path) -> None:
    results = json.loads((finished / 'results.json').read_text())
    assert (results['method'], results['memory'], len(results['stages'])) == ('sats', MEMORY, 4)
    for stage in PROTOCOL.stages:
        memory = read_exemplars(finished / f'stage_{stage.index}/exemplars.json', MEMORY)
        counts = Counter(item.stands_for for item in memory.exemplars)
        assert len(memory.exemplars) == MEMORY
        assert len(counts) == len(stage.seen)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(item.stands_for in item.holds for item in memory.exemplars)


def test_exemplars_come_from_the_stage_or_the_memory_before_it(finished: Path) -> None:
    known: set[str] = set()
    for index in range(4):
        own = DATASETS.build(stage_dataset_cfg(stage_of(finished, index).train_dataloader.dataset))
        memory = read_exemplars(finished / f'stage_{index}/exemplars.json')
        names = {item.image for item in memory.exemplars}
        assert names <= known | set(own.image_files())
        if index:
            # Old exemplars are not exchanged for others as long as their class has room.
            assert len(names & known) >= MEMORY - 2 * MEMORY // (3 + index)
        known = names


def test_images_counts_the_stages_own(finished: Path) -> None:
    stages = json.loads((finished / 'results.json').read_text())['stages']
    for index in range(4):
        dataset = DATASETS.build(stage_of(finished, index).train_dataloader.dataset)
        own = dataset.parts['stage'] if index else dataset
        assert stages[index]['images'] == len(own)
        assert len(dataset) == len(own) + (MEMORY if index else 0)


def test_half_of_what_a_stage_trains_on_is_replayed(finished: Path) -> None:
    cfg = stage_of(finished, 2)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    own = len(loader.dataset.parts['stage'])
    assert len(loader) == -(-own // 4)
    first = next(iter(loader))['data_samples']
    assert Counter(sample.source for sample in first) == dict(stage=4, memory=4)
    # An old class is there for the exemplars alone.
    old = {
        sample.source: {int(c) for s in first if s.source == sample.source for c in s.gt_sem_seg.data.unique()}
        for sample in first
    }
    assert old['stage'] <= {0, 5}
    assert old['memory'] & {1, 2, 3, 4}


def test_thresholds_are_found_on_the_stages_images_alone(finished: Path) -> None:
    cfg = stage_of(finished, 2)
    found = training_images_once(SimpleNamespace(cfg=cfg))
    assert found['dataset'].type == 'IncrementalDataset'
    assert found['dataset'].pipeline == cfg.test_pipeline
    assert cfg.train_dataloader.dataset.type == 'ReplayDataset'


def test_a_run_stopped_before_its_memory_was_kept_goes_on(
    finished: Path, shapes_cfg: MakeConfig
) -> None:
    kept = finished / 'stage_3/exemplars.json'
    before = kept.read_text()
    (finished / 'stage_3/done').unlink()
    kept.unlink()
    cfg = shapes_cfg('sats', memory=MEMORY, work_dir=str(finished), resume=True)
    RUNNERS.build(cfg).train()
    assert kept.read_text() == before
    cfg.memory = 12
    with pytest.raises(ValueError, match='memory: 10 there, 12 in the config'):
        RUNNERS.build(cfg)


@pytest.mark.parametrize('method', ['recall', 'st_cil'])
def test_outside_images_in_a_whole_run(
    method: str, shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    # Two iterations a stage; RECALL with a memory beside, which shares the replayed half.
    memory = 6 if method == 'recall' else 0
    cfg = shapes_cfg(method, val_images=6, batch_size=4, memory=memory)
    cfg.train_dataloader.num_batch_per_epoch = 2
    results = RUNNERS.build(cfg).train()
    assert [len(stage['iou']) for stage in results['stages']] == [4, 5, 6, 7]
    assert 'outside_labeler' not in stage_of(tmp_path / 'run', 0).model
    dataset = DATASETS.build(stage_of(tmp_path / 'run', 1).train_dataloader.dataset)
    sources = {'stage', 'outside'} | ({'memory'} if memory else set())
    assert set(dataset.parts) == sources
    own, other = (
        dataset[dataset.ranges[name][0]]['data_samples'].img_path for name in ('stage', 'outside')
    )
    assert 'seed0' in own
    assert 'seed1' in other
    kept = read_exemplars(tmp_path / 'run/stage_3/exemplars.json')
    assert len(kept.exemplars) == memory


# The same for every method


def test_the_budget_and_the_exemplars_are_the_same_for_every_method(
    shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    assert {'finetune', 'recall', 'sats', 'st_cil'} <= set(METHODS)
    with Sharing():  # the data are the same, too
        found = {
            method: keep_all(shapes_cfg(method, memory=MEMORY), tmp_path / method)
            for method in METHODS
        }
    assert all(texts == found['sats'] for texts in found.values())
    for method in METHODS:
        cfg = stage_cfg(shapes_cfg(method, memory=MEMORY), 1, tmp_path / method)
        assert len(DATASETS.build(cfg.train_dataloader.dataset).parts['memory']) == MEMORY


def test_a_run_keeps_what_a_dry_run_says(
    finished: Path, shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    texts = [(finished / f'stage_{index}/exemplars.json').read_text() for index in range(4)]
    assert keep_all(shapes_cfg('sats', memory=MEMORY), tmp_path / 'dry') == texts
    assert keep_all(shapes_cfg('sats', memory=MEMORY, seed=1), tmp_path / 'other') != texts


def test_a_memory_of_another_class_order_or_budget_is_refused(
    shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    keep_all(shapes_cfg('sats', memory=MEMORY), tmp_path / 'run')
    cfg = shapes_cfg('sats', memory=MEMORY, class_order=[6, 5, 4, 3, 2, 1])
    other = Protocol('3-1', 6, cfg.class_order)
    stage = build_stage_config(cfg, other, other.stages[1], tmp_path / 'run')
    with pytest.raises(ValueError, match=r'stage_0/exemplars.json is of another run: .*not seen'):
        keep_exemplars(stage, other.stages[1], tmp_path, tmp_path / 'run/stage_0')
    cfg = stage_cfg(shapes_cfg('sats', memory=MEMORY + 1), 1, tmp_path / 'run')
    with pytest.raises(ValueError, match='budget of 10, the config has memory=11'):
        keep_exemplars(cfg, PROTOCOL.stages[1], tmp_path, tmp_path / 'run/stage_0')


@pytest.mark.parametrize('selection', ['RandomMemory', 'ReservoirMemory', 'MostLabelledMemory'])
def test_other_selections_are_one_word(
    selection: str, shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    cfg = shapes_cfg('sats', memory=MEMORY, **{'memory_selection.type': selection})
    files = [json.loads(text) for text in keep_all(cfg, tmp_path / 'run')]
    assert [file['selection'] for file in files] == [selection] * 4
    assert all(len(file['exemplars']) == MEMORY for file in files)
    offered = [file['offered'] for file in files]
    assert offered == sorted(offered)
    assert offered[-1] > 24  # an image of several stages comes by more than once
    if selection == 'ReservoirMemory':  # which counts them; what is in the memory is not offered again
        for index in (1, 2, 3):
            dataset = stage_cfg(cfg, index, tmp_path / 'run').train_dataloader.dataset
            own = DATASETS.build(stage_dataset_cfg(dataset)).image_files()
            kept = {item['image'] for item in files[index - 1]['exemplars']}
            assert offered[index] == offered[index - 1] + len(set(own) - kept)
    if selection == 'MostLabelledMemory':
        numbers = [len(item['holds']) for item in files[-1]['exemplars']]
        assert numbers == sorted(numbers, reverse=True)


def test_without_a_memory_the_file_is_empty(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    files = [json.loads(text) for text in keep_all(shapes_cfg('sats'), tmp_path / 'run')]
    assert [(file['size'], file['exemplars']) for file in files] == [(0, [])] * 4
    assert 'batch_sampler' not in stage_cfg(shapes_cfg('sats'), 1, tmp_path).train_dataloader


def test_mixed_in_instead_of_half(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = shapes_cfg('sats', memory=MEMORY, replay_share=None)
    keep_all(cfg, tmp_path / 'run')
    loader = Runner.build_dataloader(stage_cfg(cfg, 1, tmp_path / 'run').train_dataloader, seed=0)
    assert len(loader) == -(-len(loader.dataset) // 8)


REPLAYING = [
    path for path in BUILT if path.stem.endswith('_m') or path.parent.name in ('recall', 'st_cil')
]


@pytest.mark.parametrize('path', REPLAYING, ids=short)
def test_the_configs_replay_from_stage_1_on(path: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(path)
    classes = 6 if 'shapes' in path.stem else 20
    if 'ade20k' in path.stem:
        classes = 150
    protocol = Protocol(cfg.protocol, classes)
    check_replay(cfg, protocol)
    first, second = (
        build_stage_config(cfg, protocol, stage, tmp_path) for stage in protocol.stages[:2]
    )
    assert first.train_dataloader.dataset.type == 'IncrementalDataset'
    replayed = second.train_dataloader.dataset
    assert second.train_dataloader.batch_sampler.share == 0.5
    if path.stem.endswith('_m'):
        assert replayed.memory == cfg.memory > 0
        assert replayed.exemplars == str(tmp_path / 'stage_0/exemplars.json')
    if path.parent.name in ('recall', 'st_cil'):
        assert replayed.outside.dataset.type in ('ImageFolder', 'ShapesDataset')
        assert second.model.outside_labeler == cfg.outside_labeler


# Refused before training


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(memory=-1), ValueError, r'memory=-1: expected 0 \(none\) or a number'),
        (dict(memory=4), ValueError, 'memory=4 is too small: 5 foreground classes .* at least 5'),
        (dict(memory=2.5), TypeError, 'memory=2.5: expected a whole number'),
        (dict(memory=True), TypeError, 'memory=True: expected a whole number'),
        (dict(memory='many'), TypeError, "memory='many': expected a whole number"),
        (dict(memory=9, protocol='joint'), ValueError, "'joint' has one stage, so nothing is replayed"),
        (
            {'memory': 9, 'memory_selection.type': 'ClassBalanceMemory'},
            KeyError,
            "did you mean 'ClassBalancedMemory'",
        ),
        (dict(memory=9, replay_share='half'), ValueError, "replay_share='half': expected a part"),
        (dict(memory=9, batch_size=1), ValueError, 'batch_size=1 .* leaves 1 places'),
        (
            dict(outside_dataset=dict(type='ImageFolder', root='x')),
            ValueError,
            'outside images need both outside_dataset .* and outside_labeler',
        ),
    ],
)
def test_bad_values_are_refused_before_training(
    options: dict[str, Any], error: type, message: str, shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        RUNNERS.build(shapes_cfg('sats', **options))
    assert not (tmp_path / 'run').exists()


def test_as_many_exemplars_as_classes_before_the_last_stage_are_enough(shapes_cfg: MakeConfig) -> None:
    check_replay(shapes_cfg('sats', memory=5), PROTOCOL)


def test_exemplars_and_outside_images_need_a_place_each(shapes_cfg: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r'1 for 2 source\(s\) of replay'):
        RUNNERS.build(shapes_cfg('recall', memory=9, batch_size=2))


@pytest.mark.parametrize('method', ['recall', 'st_cil'])
def test_outside_root_must_be_named(method: str, shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    voc = Config.fromfile(CONFIGS / method / 'segformer_b2_voc_15-1.py')
    assert voc.outside_root is None
    cfg = shapes_cfg(method, outside_root=None)
    cfg.outside_dataset = voc.outside_dataset
    with pytest.raises(ValueError, match='set outside_root=FOLDER'):
        RUNNERS.build(cfg)
    cfg.outside_root = str(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder of images'):
        RUNNERS.build(cfg)
