# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The method that docs/new_method.md builds, from the code that stands there."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.registry import MODELS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'new_method.md'


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, beside the project's configs."""
    root = tmp_path_factory.mktemp('page')
    (root / 'configs').symlink_to(ROOT / 'configs')
    # A block belongs to the file that the text before it names.
    named = re.compile(r'`(my_methods/[\w./-]+\.py)`[^`]*```python\n(.*?)```', re.DOTALL)
    for name, code in named.findall(PAGE.read_text()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(root))
    yield root
    patch.undo()


def test_every_block_of_the_page_is_a_file(folder: Path) -> None:
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob('my_methods/**/*.py'))
    assert written == [
        'my_methods/dkd/segformer_tiny_shapes_3-1.py', 'my_methods/dkd_loss.py', 'my_methods/test_dkd_loss.py',
    ]  # fmt: skip
    assert PAGE.read_text().count('```python') == len(written)


def test_the_pages_test_passes(folder: Path) -> None:
    importlib.import_module('my_methods.test_dkd_loss').test_decoupled_distillation()


def test_the_loss_is_dkds(folder: Path) -> None:
    """Eq. (7), pixel by pixel."""
    importlib.import_module('my_methods.dkd_loss')
    student, teacher = torch.randn(1, 5, 2, 2).double(), torch.randn(1, 4, 2, 2).double()
    total = 0.0
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        p, q = ((z[0, :4, y, x] / 4).softmax(0).tolist() for z in (student, teacher))
        t = max(range(4), key=q.__getitem__)
        rest = [c for c in range(4) if c != t]
        kl = [(q[t], p[t]), (1 - q[t], 1 - p[t])]
        hat = [(q[c] / (1 - q[t]), p[c] / (1 - p[t])) for c in rest]
        target, others = (sum(b * torch.tensor(b / a).log().item() for b, a in pairs) for pairs in (kl, hat))
        total += 16 * (target + 8 * others) / 4
    loss = MODELS.build(dict(type='DecoupledDistillationLoss'))
    assert loss.distance(student, teacher).item() == pytest.approx(total, rel=1e-4)


def test_the_pages_config_trains(folder: Path, shapes_root: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(folder / 'my_methods/dkd/segformer_tiny_shapes_3-1.py')
    cfg.merge_from_dict(dict(
        data_root=str(shapes_root), work_dir=str(tmp_path / 'run'), protocol='3-3', epochs=1, image_size=64,
        crop_size=64, train_images=24, val_images=12, batch_size=4, report=None))
    cfg.train_dataloader.num_batch_per_epoch = 2
    cfg.test_dataloader.num_batch_per_epoch = 2
    cfg.default_hooks.logger.interval = 1
    assert RUNNERS.build(cfg).train()['method'] == 'dkd'
    (path,) = (tmp_path / 'run/stage_1').glob('*/vis_data/scalars.json')
    losses = [json.loads(line).get('loss_decoupled') for line in path.read_text().splitlines()]
    assert losses[1] > 0
