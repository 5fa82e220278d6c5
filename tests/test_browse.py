# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Contact sheets show what training gets: the same crop in image, full mask and labels."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from mmseg_sats.engine import PseudoLabelThresholdHook, StageRunner
from mmseg_sats.engine.checks.training_pictures import build_labeling_model
from mmseg_sats.protocol import UNKNOWN_LABEL
from mmseg_sats.visualization import contact_sheet, theme
from tests.small_models import images, samples
from tests.test_unknown import labels_with_unknown, next_stage

TOOL = runpy.run_path(str(Path(__file__).parents[1] / 'tools/browse_incremental.py'))


@pytest.fixture
def stage_cfg(tiny_runs: list[Path]) -> Config:
    init_default_scope('mmseg')
    cfg = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    for step in cfg.train_dataloader.dataset.dataset.pipeline:
        if step.type == 'RandomCrop':
            step.crop_size = (40, 48)
    return cfg


def pictures(cfg: Config, model: Any = None) -> tuple[Any, list[contact_sheet.TrainingPicture]]:
    dataset = DATASETS.build(contact_sheet.keep_full_labels(cfg.train_dataloader.dataset))
    return dataset, contact_sheet.training_pictures([dataset[i] for i in range(6)], model)


def test_full_mask_and_labels_are_of_the_same_crop(stage_cfg: Config) -> None:
    dataset, shown = pictures(stage_cfg)
    assert sum(picture.labels.any() for picture in shown) >= 3
    for picture in shown:
        assert picture.image.shape == (40, 48, 3)
        np.testing.assert_array_equal(dataset.table[picture.full], picture.labels)
        assert picture.source == 'stage'
    old = set(dataset.stage.old)
    assert any(old & set(np.unique(picture.full)) for picture in shown)
    # The config that the run keeps is not touched.
    assert 'LoadFullAnnotations' not in stage_cfg.pretty_text


def test_pseudo_labels_are_those_of_the_loss(
    stage_cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS.build(stage_cfg.model)
    runner = SimpleNamespace(cfg=stage_cfg, build_dataloader=StageRunner.build_dataloader)
    PseudoLabelThresholdHook().find(runner, model)
    # What a stage has not found yet is found for its pictures.
    unfinished = build_labeling_model(stage_cfg, Path('no/stage'))
    assert unfinished.pseudo_labeler.state_dict() == model.pseudo_labeler.state_dict()
    dataset = DATASETS.build(contact_sheet.keep_full_labels(stage_cfg.train_dataloader.dataset))
    sample = dataset[0]
    (shown,) = contact_sheet.training_pictures([sample], model)
    batch = model.data_preprocessor(
        dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]), True
    )
    seen = []
    monkeypatch.setattr(
        model, '_segmentation_losses', lambda heads, student, inputs, labels: seen.append(labels) or {}
    )
    model.loss(batch['inputs'], batch['data_samples'])
    np.testing.assert_array_equal(shown.completed, seen[0][0, :40, :48].numpy())
    new = shown.labels != 0
    np.testing.assert_array_equal(shown.completed[new], shown.labels[new])


def test_unknown_pixels_are_completed_as_for_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = next_stage(tmp_path, pseudo_labeler=dict(type='SigmoidPseudoLabeler', threshold=0.5))
    model.data_preprocessor = MODELS.build(dict(type='SegDataPreProcessor', size=(64, 64)))
    labels = labels_with_unknown()[0]
    sample = dict(inputs=3 * images(1, seed=4)[0],  # which shows old classes to the old model
                  data_samples=samples(labels[None])[0])
    sample['data_samples'].set_metainfo(dict(img_path='a.png', source='stage'))
    sample['data_samples'].gt_full_map = sample['data_samples'].gt_sem_seg
    (shown,) = contact_sheet.training_pictures([sample], model)
    seen = []
    monkeypatch.setattr(model, '_segmentation_losses', lambda *args: seen.append(args[-1]) or {})
    monkeypatch.setattr('mmseg_sats.models.segmentors.incremental_encoder_decoder.shared_losses',
                        lambda *args: seen.append(args[4]) or {})  # fmt: skip
    data = model.data_preprocessor(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]), True)
    model.loss(data['inputs'], data['data_samples'])
    expected = seen[0][0]
    assert (expected == model.num_classes).any()  # unknown
    assert ((expected != labels) & (expected < model.num_classes)).any()  # and what the old model completed
    expected = expected.masked_fill(expected == model.num_classes, UNKNOWN_LABEL)
    np.testing.assert_array_equal(shown.completed, expected.numpy())


def test_memory_is_named(stage_cfg: Config) -> None:
    dataset = DATASETS.build(contact_sheet.keep_full_labels(stage_cfg.train_dataloader.dataset))
    dataset.get_data_info = lambda idx, info=dataset.get_data_info: dict(info(idx), source='memory')
    shown = contact_sheet.training_pictures([dataset[0]], object())
    assert shown[0].source == 'memory'
    np.testing.assert_array_equal(shown[0].completed, shown[0].labels)  # no pseudo-labels for it
    with theme.style():
        names = (dataset.class_names, [[9 * i, 0, 0] for i in range(7)])
        figure = contact_sheet.draw_sheet(shown, names, names, 'title')
    assert 'from memory' in figure.axes[0].get_xlabel()
    assert len(figure.axes) == 4


def test_a_transform_that_forgets_the_other_maps_is_named() -> None:
    results = dict(
        img=np.zeros((8, 8, 3), np.uint8),
        gt_seg_map=np.zeros((8, 8), np.uint8),
        gt_full_map=np.zeros((9, 8), np.uint8),
    )
    with pytest.raises(ValueError, match=r"changed the labels to \(8, 8\).*\(9, 8\)"):
        contact_sheet.PackFullInputs().transform(results)


def test_the_tool_draws_a_stage_of_a_run(
    tiny_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(tiny_runs[0] / 'config.py')
    words = ['--stage', '1', '--number', '7', '--out', str(tmp_path)]
    TOOL['main']([config, *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['stage_1_0.png', 'stage_1_1.png']
    whole, rest = (cv2.imread(str(tmp_path / f'stage_1_{i}.png')) for i in (0, 1))
    assert whole.shape[0] > 2 * rest.shape[0]
    TOOL['main']([config, '--stage', '0', '--number', '1', '--out', str(tmp_path)])
    assert 'no pseudo-labels: there is no old model in stage 0' in capsys.readouterr().out
    TOOL['main']([config, '--stage', '1', '--number', '1', '--out', str(tmp_path),
                  '--work-dir', str(tmp_path / 'none')])
    assert 'stage_0/snapshot.pth does not exist yet' in capsys.readouterr().out


def test_what_the_tool_cannot_do_it_says(tiny_runs: list[Path], tmp_path: Path) -> None:
    config = str(tiny_runs[0] / 'config.py')
    for words, message in (
        (['none.py'], 'config none.py does not exist'),
        ([config, '--stage', '2'], 'stage=2: .* has the stages 0 to 1'),
        ([config, '--number', '0'], 'expected at least 1 picture'),
    ):
        with pytest.raises(SystemExit, match=message):
            TOOL['main']([*words, '--out', str(tmp_path)])
    assert torch.is_grad_enabled()
