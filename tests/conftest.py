# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the tests share: a cache of their own, one drawing of the shapes, small configs."""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, config
from mmengine.model import utils as model_utils
from mmengine.optim.optimizer import default_constructor
from mmengine.registry import RUNNERS
from yapf.yapflib import yapf_api

from mmseg_sats.engine.config import config_text

CONFIGS = Path(__file__).parents[1] / 'configs'
FORMAT_CODE = yapf_api.FormatCode
# Who asks yapf: mmengine 0.10.7 by a name of its own, the fork by yapf's.
LAYING_OUT = tuple(module for module in (config_text, yapf_api, config) if hasattr(module, 'FormatCode'))

# The files that take longest, which come first: then no process of pytest-xdist has a long one left at the end.
LONGEST = (
    'test_resume', 'test_distributed', 'test_methods', 'test_surroundings', 'test_run_table', 'test_rehearsal',
    'test_own_configs', 'test_incremental_runner', 'test_memory_runs', 'test_add_classes', 'test_own_data',
    'test_packaging', 'test_bad_input', 'test_numbers', 'test_new_rows_runs', 'test_configs',
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first; within a file the order stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope='session', autouse=True)
def class_index_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Class indices of test data never land in the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv('MMSEG_SATS_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield
    patch.undo()


@pytest.fixture(scope='session', autouse=True)
def quick_runs() -> Iterator[None]:
    """Nearly half of a small run's time, which no test is about, is not spent.

    The text of configs is not laid out, unless a test asks for ``laid_out_configs``, garbage is not looked
    for among the libraries' objects, mmengine does not look for mmcv at every layer, and it does not log the options of
    every parameter. Processes that a test starts do all this.
    """
    patch = pytest.MonkeyPatch()
    for module in (default_constructor, model_utils):
        patch.setattr(module, 'mmcv_full_available', functools.cache(module.mmcv_full_available))
    patch.setattr(default_constructor, 'print_log', lambda *_, **__: None)
    if not torch.cuda.is_available():  # every seed would be noted for a GPU, with the stack of calls
        patch.setattr(torch.cuda, '_lazy_call', lambda *_, **__: None)
    for module in LAYING_OUT:
        patch.setattr(module, 'FormatCode', lambda text, **_: (f'{text}\n', True))
    gc.collect()
    gc.freeze()
    patch.setattr(gc, 'unfreeze', lambda: None)
    yield
    patch.undo()
    gc.unfreeze()


def _forget_texts() -> None:
    config_text._LAST.clear()
    config_text._laid_out.cache_clear()


@pytest.fixture
def laid_out_configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The text of configs as it is outside the tests; what was laid out is forgotten before and after."""
    for module in LAYING_OUT:
        monkeypatch.setattr(module, 'FormatCode', FORMAT_CODE)
    _forget_texts()
    yield
    _forget_texts()


@pytest.fixture(scope='session')
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shapes are drawn, once a session."""
    return tmp_path_factory.mktemp('shapes')


@pytest.fixture
def shapes_cfg(shapes_root: Path, tmp_path: Path) -> Callable[..., Config]:
    """Maker of a small run's config, without rehearsal: ``shapes_cfg('sats', epochs=1)``."""

    def make(method: str, name: str = 'run', **options: Any) -> Config:
        cfg = Config.fromfile(CONFIGS / method / 'segformer_tiny_shapes_3-1.py')
        small = dict(data_root=str(shapes_root), work_dir=str(tmp_path / name), epochs=1, image_size=64,
                     crop_size=64, train_images=24, val_images=12, batch_size=8, report=None, rehearsal=None)
        cfg.merge_from_dict(small | options)
        return cfg

    return make


@pytest.fixture(scope='session')
def tiny_runs(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Work dirs of two finished runs of two stages, SATS with its report and fine-tuning; read only."""
    folder = tmp_path_factory.mktemp('tiny')
    for method, base in (('sats', None), ('finetune', str(folder / 'sats/stage_0/snapshot.pth'))):
        cfg = Config.fromfile(CONFIGS / method / 'segformer_tiny_shapes_3-1.py')
        report = dict(images=2, attention=1) if method == 'sats' else None
        small = dict(data_root=str(shapes_root), work_dir=str(folder / method), epochs=2, image_size=64,
                     crop_size=64, train_images=24, val_images=12, batch_size=8, protocol='3-3',
                     base=base, report=report, rehearsal=None)
        cfg.merge_from_dict(small)
        RUNNERS.build(cfg).train()
    return [folder / 'sats', folder / 'finetune']
