# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The methods that docs/new_method.md builds, from the code that stands there."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.registry import MODELS

from mmseg_sats.engine.experiments.own_configs import find_configs
from tests.runs import train_interrupted_in_stage_1, weights

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'new_method.md'


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, in a folder outside the project."""
    root = tmp_path_factory.mktemp('page')
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
        'my_methods/cosine/cosine.py', 'my_methods/cosine/segformer_tiny_shapes_3-1.py', 'my_methods/cosine_loss.py',
        'my_methods/cwr_hook.py', 'my_methods/dkd/dkd.py', 'my_methods/dkd/segformer_tiny_shapes_3-1.py',
        'my_methods/dkd_loss.py', 'my_methods/sats_cwr/sats_cwr.py',
        'my_methods/sats_cwr/segformer_tiny_shapes_3-1.py', 'my_methods/test_cosine_loss.py',
    ]  # fmt: skip
    assert PAGE.read_text().count('```python') == len(written)


def test_the_pages_test_passes(folder: Path) -> None:
    importlib.import_module('my_methods.test_cosine_loss').test_cosine_feature_loss()


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
    # It is 0 for the old model itself, and the new channel is left alone.
    same = torch.cat([teacher, torch.randn(1, 1, 2, 2).double()], 1).requires_grad_()
    value = loss.distance(same, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert same.grad[:, 4:].abs().max() == 0


def test_each_method_is_a_row_of_a_table(folder: Path) -> None:
    configs, left_out = find_configs(folder / 'my_methods')
    assert [(one.name.split('/')[0], one.method, one.protocol) for one in configs] == [
        (method, method, '3-1') for method in ('cosine', 'dkd', 'sats_cwr')
    ]
    assert left_out == []


@pytest.fixture
def config(folder: Path, shapes_root: Path, tmp_path: Path) -> Callable[[str], Config]:
    """A page's config, made small."""

    def make(method: str, name: str = 'run', **options: Any) -> Config:
        cfg = Config.fromfile(folder / f'my_methods/{method}/segformer_tiny_shapes_3-1.py')
        small = dict(data_root=str(shapes_root), work_dir=str(tmp_path / name), protocol='3-3', epochs=1,
                     image_size=64, crop_size=64, train_images=24, val_images=12, batch_size=4, report=None,
                     rehearsal=None)
        cfg.merge_from_dict(small | options)
        return cfg

    return make


@pytest.mark.parametrize(('method', 'part'), [('cosine', 'features'), ('dkd', 'decoupled')])
def test_the_pages_configs_train(
    config: Callable[..., Config], tmp_path: Path, method: str, part: str
) -> None:
    cfg = config(method)
    cfg.train_dataloader.num_batch_per_epoch = 2
    cfg.test_dataloader.num_batch_per_epoch = 2
    cfg.default_hooks.logger.interval = 1
    assert RUNNERS.build(cfg).train()['method'] == method
    (path,) = (tmp_path / 'run/stage_1').glob('*/vis_data/scalars.json')
    losses = [json.loads(line).get(f'loss_{part}') for line in path.read_text().splitlines()]
    assert losses[1] > 0


def test_the_hook_puts_old_rows_back_after_a_resume_too(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    options = dict(protocol='3-1', num_shapes=4, epochs=2)
    train_interrupted_in_stage_1(config('sats_cwr', **options))
    stage = tmp_path / 'run/stage_1'
    old, trained, kept = (
        weights(path) for path in (tmp_path / 'run/stage_0/snapshot.pth', stage / 'epoch_2.pth', stage / 'snapshot.pth')
    )
    for key, value in kept.items():
        if '.conv_seg.' in key:
            assert torch.equal(value[1:4], old[key][1:4])
            assert not torch.equal(value[1:4], trained[key][1:4])
            trained[key][1:4] = value[1:4]
        assert torch.equal(value, trained[key])
