# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The evaluation of the published figures: short side to the crop, then its centre."""

from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

from mmseg_sats.datasets import EvaluateAsIs
from mmseg_sats.engine.config.variables import config_variables, resolve_variables

ROOT = Path(__file__).parents[1]


def test_label_and_prediction_have_the_crops_size(tmp_path: Path) -> None:
    init_default_scope('mmseg')
    cv2.imwrite(str(tmp_path / 'image.png'), np.zeros((30, 60, 3), np.uint8))
    mask = np.zeros((30, 60), np.uint8)
    mask[:, 15:45] = 1  # the centre square of the short side
    cv2.imwrite(str(tmp_path / 'mask.png'), mask)
    cfg = Config.fromfile(ROOT / 'configs/sats/segformer_b2_voc_15-1.py')
    cfg.crop_size = 24
    cfg.eval_pipeline = '$centre_crop_pipeline'
    pipeline = resolve_variables(cfg.eval_dataset.pipeline, config_variables(cfg))
    info = dict(
        img_path=str(tmp_path / 'image.png'),
        seg_map_path=str(tmp_path / 'mask.png'),
        label_map=None,
        reduce_zero_label=False,
        seg_fields=[],
    )
    data = Compose(pipeline)(info)
    sample = data['data_samples']
    assert data['inputs'].shape == (3, 24, 24)
    assert sample.gt_sem_seg.data.shape == (1, 24, 24)
    assert bool((sample.gt_sem_seg.data == 1).all())
    assert tuple(sample.ori_shape) == (24, 24)  # what mmseg resizes the prediction to
    wide = dict(img_shape=(4, 7), ori_shape=(9, 9))
    assert EvaluateAsIs().transform(wide)['ori_shape'] == (4, 7)
