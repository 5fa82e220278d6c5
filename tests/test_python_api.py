# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/python.md, its blocks run one after another as in a notebook; and what a Run says."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from mmengine.config import Config

import mmseg_sats
from mmseg_sats.api import Run
from mmseg_sats.datasets.shapes.drawing import draw_scene
from tests.foreign import ROOT, code_blocks, write_split
from tests.test_add_classes import old_model

PAGE = ROOT / 'docs/python.md'


def lay_out(folder: Path) -> None:
    """What the page's blocks need: photo.jpg, an old model, data with new classes."""
    pairs = []
    (folder / 'scenes').mkdir()
    for index in range(24):
        scene = draw_scene(index, split='train', num_classes=5, image_size=64, seed=0, classes_per_image=(2, 3))
        pairs.append((folder / f'scenes/{index}.jpg', folder / f'scenes/{index}.png'))
        for path, array in zip(pairs[-1], scene, strict=True):
            cv2.imwrite(str(path), array)
    cv2.imwrite(str(folder / 'photo.jpg'), np.zeros((40, 60, 3), np.uint8))
    write_split(pairs, {4: 1, 5: 2}, folder / 'data', 'train', {4, 5})
    for part in ('rgb', 'labels'):
        (folder / 'data/train').mkdir(exist_ok=True)
        (folder / f'data/{part}/train').rename(folder / f'data/train/{part}')
    old_model(folder / 'old', ['background', 'road', 'grass', 'car'])


@pytest.fixture(scope='module')
def notebook(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's blocks leave, and the folder that they were run in."""
    folder, names = tmp_path_factory.mktemp('notebook'), {}
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in code_blocks(PAGE, 'python'):
            exec(compile(block, str(PAGE), 'exec'), names)
        names['run'].work_dir = names['run'].work_dir.resolve()
    return names | dict(folder=folder)


def test_figures_are_those_of_the_files(notebook: dict[str, Any]) -> None:
    run, work_dir = notebook['run'], notebook['folder'] / 'work_dirs/tiny'
    results = json.loads((work_dir / 'results.json').read_text())
    assert run.results == results
    assert run.final == results['final']
    assert [stage['mIoU'] for stage in run.by_stage] == [stage['mIoU'] for stage in results['stages']]
    assert run.by_stage[-1]['hIoU'] == results['final']['hIoU']
    assert all(stage['seconds'] > 0 for stage in run.by_stage)
    assert Config.fromfile(work_dir / 'config.py').later_stages.lr == 1e-3


def test_models_know_the_classes_of_their_stages(notebook: dict[str, Any]) -> None:
    run = notebook['run']
    assert list(notebook['model'].dataset_meta['classes']) == run.classes
    assert not notebook['model'].training
    assert notebook['result'].pred_sem_seg.data.shape == (1, 40, 60)


def test_a_run_shows_itself(notebook: dict[str, Any]) -> None:
    run = notebook['run']
    assert isinstance(run, Run)
    assert isinstance(notebook['figure'], Figure)
    assert repr(run).startswith(f"Run('{notebook['folder']}/work_dirs/tiny', sats")
    assert f'all {run.final["all"]:.2f}' in repr(run)


def test_stages_that_are_not_there_are_named(
    notebook: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notebook['folder'])
    run = mmseg_sats.load_run('work_dirs/tiny')
    assert run.stage_dir(0).name == 'stage_0'
    assert run.stage_dir().name == f'stage_{len(run.by_stage) - 1}'
    with pytest.raises(IndexError, match='no finished stage 9: expected 0 to 3'):
        run.model(9)
    with pytest.raises(FileNotFoundError):
        mmseg_sats.load_run('nowhere')


def test_added_classes_are_the_commands(notebook: dict[str, Any]) -> None:
    added = notebook['added']
    assert added.table.new == ('tree', 'house')
    assert (notebook['folder'] / 'work_dirs/added/model.safetensors').is_file()


def test_the_config_is_left_as_it_was(tmp_path: Path) -> None:
    """Options are merged into a copy; without work_dir it is the command's default."""
    cfg = Config.fromfile(ROOT / 'configs/sats/segformer_tiny_shapes_3-1.py')
    before = cfg.to_dict()
    with pytest.raises(ValueError, match='epochs=0: expected a whole number from 1'):
        mmseg_sats.train(cfg, epochs=0)
    assert cfg.to_dict() == before
    with pytest.raises(KeyError, match='epoch'):
        mmseg_sats.train(cfg, epoch=3)
