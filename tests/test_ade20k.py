# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ADE20K's configs on a folder like ADEChallengeData2016: 151 labels, of which 0 is background."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset
from mmseg.registry import DATASETS

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.incremental_runner import IncrementalRunner
from mmseg_sats.engine.run_plan import build_protocol
from tests.conftest import CONFIGS

HEIGHT, WIDTH = 12, 20
# Name to labels: one image per class, and some with classes of several stages.
MIXED = {'mixed_0': [0, 1, 105], 'mixed_1': [5, 120, 150], 'nothing': [0]}
LABELS = {f'class_{label:03d}': [0, label] for label in range(1, 151)} | MIXED


@pytest.fixture(scope='module')
def ade_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder: stripes of each image's labels, for training and for validation."""
    root = tmp_path_factory.mktemp('ade')
    for split in ('training', 'validation'):
        for part in ('images', 'annotations'):
            (root / part / split).mkdir(parents=True)
        for name, labels in LABELS.items():
            mask = np.repeat(np.resize(labels, WIDTH)[None], HEIGHT, 0).astype(np.uint8)
            cv2.imwrite(str(root / 'annotations' / split / f'{name}.png'), mask)
            cv2.imwrite(str(root / 'images' / split / f'{name}.jpg'), np.stack([mask] * 3, -1))
    return root


def config(name: str, root: Path, **changes: Any) -> Config:
    """``configs/sats/segformer_b2_ade20k_<name>.py`` on the folder."""
    init_default_scope('mmseg')
    cfg = Config.fromfile(CONFIGS / 'sats' / f'segformer_b2_ade20k_{name}.py')
    cfg.merge_from_dict(
        dict(data_root=str(root), work_dir=str(root / 'run'), pretrained=None, crop_size=16) | changes
    )
    return cfg


def datasets(name: str, root: Path, loader: str, **changes: Any) -> list[IncrementalDataset]:
    """The data set of every stage."""
    cfg = config(name, root, **changes)
    protocol = build_protocol(cfg)
    stages = [build_stage_config(cfg, protocol, stage, cfg.work_dir) for stage in protocol.stages]
    return [DATASETS.build(stage_cfg[loader].dataset) for stage_cfg in stages]


def labels_of(dataset: IncrementalDataset, index: int) -> np.ndarray:
    return np.unique(dataset[index]['data_samples'].gt_sem_seg.data.numpy())


def test_a_run_finds_nothing_wrong_with_it(ade_root: Path) -> None:
    cfg = config('100-10', ade_root, crop_size=64)
    assert IncrementalRunner(cfg).protocol.stages == build_protocol(cfg).stages


@pytest.mark.parametrize(
    ('name', 'sizes'),
    [
        ('100-10', [100, 10, 10, 10, 10, 10]),
        ('25-25', [25] * 6),
        ('100-50', [100, 50]),
        ('100-5', [100, *[5] * 10]),
        ('50-50', [50] * 3),
    ],
)
def test_every_stage_has_its_images(ade_root: Path, name: str, sizes: list[int]) -> None:
    stages = datasets(name, ade_root, 'train_dataloader')
    assert [len(dataset.stage.new) for dataset in stages] == sizes
    first = 1
    for dataset, size in zip(stages, sizes, strict=True):
        new = set(range(first, first + size))
        first += size
        expected = {image for image, labels in LABELS.items() if new & set(labels)}
        assert {Path(image).name for image in dataset.image_names()} == expected


def test_disjoint_leaves_out_images_with_a_later_class(ade_root: Path) -> None:
    for overlapped, disjoint in zip(
        datasets('100-10', ade_root, 'train_dataloader'),
        datasets('100-10_disjoint', ade_root, 'train_dataloader'),
        strict=True,
    ):
        gone = set(overlapped.image_names()) - set(disjoint.image_names())
        later = set(disjoint.stage.future)
        assert {Path(name).name for name in gone} == {
            name for name, labels in MIXED.items()
            if set(labels) & set(disjoint.stage.new) and set(labels) & later
        }


def test_label_0_is_background_and_never_ignored(ade_root: Path) -> None:
    stages = datasets('100-10', ade_root, 'train_dataloader')
    classes = ADE20KDataset.METAINFO['classes']
    assert stages[1].metainfo['classes'] == ('background', *classes[:110])
    assert stages[1].table[0] == 0
    assert stages[1].table[[100, 101, 110, 111]].tolist() == [0, 101, 110, 0]
    assert 255 not in stages[1].table[:151]
    for index, name in enumerate(stages[1].image_names()):
        new = set(LABELS[Path(name).name]) & set(range(101, 111))
        # A crop or the padding of a crop may hide a class, and brings nothing else but 255.
        assert set(labels_of(stages[1], index).tolist()) <= {0, 255} | new


def test_evaluation_keeps_the_size_of_the_labels(ade_root: Path) -> None:
    stages = datasets('100-10', ade_root, 'test_dataloader')
    assert len(stages[0]) == 100 + 2
    assert len(stages[5]) == 150 + 2
    place = [Path(name).name for name in stages[5].image_names()].index('mixed_1')
    sample = stages[5][place]
    assert sample['data_samples'].gt_sem_seg.data.shape[-2:] == (HEIGHT, WIDTH)
    assert sample['inputs'].shape[1] == 16  # the short side, as in training
    assert labels_of(stages[5], place).tolist() == [5, 120, 150]
    assert labels_of(stages[0], [Path(n).name for n in stages[0].image_names()].index('mixed_1')).tolist() == [0, 5]


def test_class_orders_are_chosen_by_name(ade_root: Path) -> None:
    stages = datasets('100-10', ade_root, 'train_dataloader', class_order='$class_order_b')
    assert stages[1].stage.new == (11, 16, 50, 64, 66, 73, 89, 92, 145, 146)
    assert {Path(name).name for name in stages[1].image_names()} == {
        f'class_{label:03d}' for label in stages[1].stage.new
    }
    # Channel 101 is the first class of stage 1.
    assert stages[1].table[11] == 101
