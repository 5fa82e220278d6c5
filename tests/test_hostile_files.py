# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Files from somewhere else do nothing but what a file should: be read, or be refused."""

import ast
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmseg_sats.datasets.checks.image_sizes import check_inside
from mmseg_sats.engine import StageRunner
from mmseg_sats.engine.files.snapshot import latest_checkpoint
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

ROOT = Path(__file__).parents[1]


class Payload:
    """Pickled as a call that makes a folder: what code in a file could do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def stage(tiny_runs: list[Path], tmp_path: Path) -> Config:
    """The config of a stage 0 that has an epoch's checkpoint."""
    shutil.copytree(tiny_runs[0] / 'stage_0', tmp_path / 'run/stage_0')
    cfg = Config.fromfile(tmp_path / 'run/stage_0/config.py')
    cfg.work_dir, cfg.resume = str(tmp_path / 'run/stage_0'), True
    return cfg


def spoil(path: Path, meta: dict[str, Any]) -> str:
    """A copy of a checkpoint with more in its ``meta``."""
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta'].update(meta)
    torch.save(checkpoint, path.with_name('spoilt.pth'))
    return str(path.with_name('spoilt.pth'))


def test_a_stage_runs_nothing_out_of_its_checkpoint(stage: Config, tmp_path: Path) -> None:
    checkpoint = tmp_path / 'run/stage_0/epoch_1.pth'
    marker = tmp_path / 'executed'
    stage.load_from = spoil(checkpoint, dict(code=Payload(marker)))
    with pytest.raises(ValueError, match=r'spoilt\.pth is not a checkpoint that can be read safely'):
        StageRunner.from_cfg(stage).train()
    assert not marker.exists()
    # A config text: mmengine's own resume executes it, ours trains on.
    text = f"__import__('os').mkdir({str(marker)!r})\ngpu_ids = [0]\n"
    stage.load_from = spoil(checkpoint, dict(config=text))
    StageRunner.from_cfg(stage.copy()).train()
    assert not marker.exists()
    Runner.from_cfg(stage.copy()).train()
    assert marker.exists()


def test_a_hostile_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    marker = tmp_path / 'executed'
    content = dict(state_dict={}, meta=dict(iter=9, epoch=9, code=Payload(marker)))
    torch.save(content, tmp_path / 'epoch_9.pth')
    assert latest_checkpoint(tmp_path) is None
    assert not marker.exists()


def test_a_log_history_is_numbers_and_nothing_else(stage: Config, tmp_path: Path) -> None:
    hub = load_checkpoint_safely(tmp_path / 'run/stage_0/epoch_1.pth')['message_hub']
    values, counts = hub['log_scalars']['train/loss'].data
    assert len(values) == len(counts) > 0
    assert all(value > 0 for value in values)


def test_every_file_is_read_safely() -> None:
    """One place calls torch.load, with weights_only=True; no np.load allows pickle, nobody unpickles."""
    found = []
    for path in [*ROOT.glob('mmseg_sats/**/*.py'), *ROOT.glob('tools/*.py'), *ROOT.glob('benchmarks/*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            careful = path.name == 'checkpoint.py' and options.get('weights_only') == 'True'
            if called == 'torch.load' and not careful:
                found.append((path.name, node.lineno))
            if called == 'np.load' and options.get('allow_pickle') != 'False':
                found.append((path.name, node.lineno))
            if called in ('pickle.load', 'pickle.loads'):
                found.append((path.name, node.lineno))
    assert found == []


@pytest.mark.parametrize(
    ('path', 'inside'),
    [
        ('/data/images/a.png', True),
        ('/data/images/../masks/a.png', True),
        ('/data/../data/a.png', True),
        ('/data/../other/a.png', False),
        ('/database/a.png', False),
        ('/etc/passwd', False),
        ('/data/images/../../etc/passwd', False),
    ],
)
def test_paths_stay_below_the_data_root(path: str, inside: bool) -> None:
    if inside:
        check_inside([path], ['/data/'])
    else:
        with pytest.raises(ValueError, match='leaves the data root /data/'):
            check_inside(['/data/b.png', path], ['/data/'])
