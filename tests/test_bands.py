# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Images of one band and of five, and files that only a loader of the user's reads: trained, shown and exported."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.registry import TRANSFORMS
from PIL import Image

from mmseg_sats.datasets.saliency import spectral_residual
from mmseg_sats.engine.export.stock import export_stage, load_for_export
from mmseg_sats.visualization.masks import rgb_image
from mmseg_sats.visualization.predictions import predicted_overlay, read_image
from tests.stage_folder import make_stage
from tests.test_bad_input import CONFIG, ROOT, draw

BANDS = """
train_dataset['img_suffix'] = eval_dataset['img_suffix'] = '.npy'
train_pipeline = [dict(type='LoadBandsOfTest'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_pipeline = [dict(type='LoadBandsOfTest'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
model = dict(backbone=dict(in_channels=5), data_preprocessor=dict(mean=[0.0], std=[3000.0], bgr_to_rgb=False))
protocol, num_workers = '3-3', 0
report = None
"""


@TRANSFORMS.register_module()
class LoadBandsOfTest(BaseTransform):
    """A loader of the user's own."""

    def transform(self, results: dict) -> dict:
        """Reads five bands."""
        img = np.load(results['img_path'], allow_pickle=False)
        return results | dict(img=img, img_shape=img.shape[:2], ori_shape=img.shape[:2])


def test_five_bands_in_files_that_pillow_does_not_read(tmp_path: Path) -> None:
    draw(tmp_path / 'data')
    for path in (tmp_path / 'data/images').iterdir():
        image = np.array(Image.open(path)).astype(np.float32) * 30
        np.save(path.with_suffix('.npy'), np.concatenate([image, image[..., :2]], axis=2))
        path.unlink()
    config = tmp_path / 'own.py'
    config.write_text(CONFIG.format(configs=ROOT / 'configs', data=tmp_path / 'data') + BANDS)
    cfg = Config.fromfile(config)
    cfg.work_dir = str(tmp_path / 'run')
    RUNNERS.build(cfg).train()
    _, model = load_for_export(tmp_path / 'run/stage_1')
    picture = predicted_overlay(model, tmp_path / 'data/images/3.npy')
    assert picture.dtype == np.uint8
    (tmp_path / 'broken.npy').write_text('no array')
    with pytest.raises(ValueError, match=r'broken\.npy is no image'):
        read_image(model, tmp_path / 'broken.npy')


def test_one_band(tmp_path: Path) -> None:
    load = dict(type='LoadImageFromFile', color_type='grayscale')
    changes = {
        'model.backbone.in_channels': 1,
        'model.data_preprocessor.mean': [100.0],
        'model.data_preprocessor.std': [50.0],
        'model.data_preprocessor.bgr_to_rgb': False,
        'test_pipeline': [load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    }
    stage = make_stage(tmp_path / 'run', **changes)
    cv2.imwrite(str(tmp_path / 'a.png'), np.full((32, 40), 70, np.uint8))
    _, model = load_for_export(stage)
    assert (read_image(model, tmp_path / 'a.png') == np.full((32, 40, 3), 70)).all()
    assert predicted_overlay(model, tmp_path / 'a.png').shape[2] == 3
    export_stage(stage, tmp_path / 'out')
    assert (tmp_path / 'out/config.py').is_file()


def test_saliency_of_any_bands() -> None:
    image = np.random.default_rng(0).random((40, 50, 5)).astype(np.float32)
    expected = spectral_residual(image.mean(axis=2))
    np.testing.assert_allclose(spectral_residual(image), expected, rtol=1e-4)
    np.testing.assert_allclose(spectral_residual(image[..., :1]), spectral_residual(image[..., 0]), rtol=1e-4)


def test_bands_as_a_picture() -> None:
    bands = torch.arange(5.0)[:, None, None].expand(5, 2, 3) * 100
    assert rgb_image(bands)[0, 0].tolist() == [200, 100, 0]  # the first three, BGR
    assert rgb_image(bands * 10)[0, 0].tolist() == [255, 127, 0]  # scaled to what can be shown
    assert rgb_image(bands[:1] + 40)[0, 0].tolist() == [40, 40, 40]
    photograph = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    assert rgb_image(photograph)[0, 0].tolist() == [3, 2, 1]
