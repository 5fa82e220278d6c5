# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the tests share: a cache of their own, one drawing of the shapes, small configs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.fixture(scope='session', autouse=True)
def class_index_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Class indices of test data never land in the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv('MMSEG_SATS_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield
    patch.undo()


@pytest.fixture(scope='session', autouse=True)
def configs_as_they_come() -> None:
    """Configs are written without yapf's layout, which takes longer than the small trainings."""
    patch = pytest.MonkeyPatch()
    patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
    yield
    patch.undo()


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shapes are drawn, once a session."""
    return tmp_path_factory.mktemp('shapes')


@pytest.fixture
def shapes_cfg(shapes_root: Path, tmp_path: Path) -> Callable[..., Config]:
    """Maker of a small run's config: ``shapes_cfg('sats', epochs=1)``."""

    def make(method: str, name: str = 'run', **options: Any) -> Config:
        cfg = Config.fromfile(CONFIGS / method / 'segformer_tiny_shapes_3-1.py')
        small = dict(data_root=str(shapes_root), work_dir=str(tmp_path / name), epochs=1, image_size=64,
                     crop_size=64, train_images=24, val_images=12, batch_size=8)
        cfg.merge_from_dict(small | options)
        return cfg

    return make
