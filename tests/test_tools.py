# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The command line, as a person uses it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_sats import commands
from mmseg_sats.engine.experiments.evaluate_again import stage_config
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.in_process import call
from tests.shared import shared_path

ROOT = Path(__file__).parents[1]
SMALL = [
    'epochs=1', 'image_size=64', 'crop_size=64', 'train_images=24', 'val_images=13', 'batch_size=4',
    'protocol=3-3', 'report=None',
]  # fmt: skip


def run(
    *command: str, cwd: Path = ROOT, timeout: int = 550, **environment: str
) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {'PATH': path, 'PYTHONPATH': str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(config: str, work_dir: Path, *words: str) -> subprocess.CompletedProcess:
    return run(
        sys.executable, 'tools/train_incremental.py', f'configs/{config}.py',
        '--work-dir', str(work_dir), *words,
    )  # fmt: skip


@pytest.fixture(scope='module')
def trained(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp('tools') / 'sats'
    options = ['--cfg-options', f'data_root={shapes_root}', *SMALL]
    result = train('sats/segformer_tiny_shapes_3-1', work_dir, *options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return work_dir


def test_evaluating_again_gives_the_same_figures(trained: Path) -> None:
    result = call('tools/test_incremental.py', str(trained), '--stage', '1')
    assert result.returncode == 0, result.stderr[-3000:]
    (again,) = json.loads((trained / 'test/test.json').read_text())
    first = json.loads((trained / 'results.json').read_text())['stages'][1]
    assert again['iou'] == first['iou']
    assert again['mIoU'] == first['mIoU']


def test_options_of_an_evaluation_reach_the_stage(tiny_runs: list[Path], tmp_path: Path) -> None:
    folder = tiny_runs[0] / 'stage_1'
    options = {'eval_images': 'all', 'data_root': str(tmp_path), 'test_dataloader.batch_size': 3}
    cfg = stage_config(folder, options)
    assert cfg.test_dataloader.dataset.eval_images == 'all'
    assert cfg.test_dataloader.dataset.dataset.data_root == str(tmp_path)
    assert cfg.test_dataloader.batch_size == 3
    assert stage_config(folder, {}).pretty_text == Config.fromfile(folder / 'config.py').pretty_text
    with pytest.raises(KeyError, match=r"eval_image: .*did you mean 'eval_images'"):
        stage_config(folder, {'eval_image': 'all'})
    # A stage's folder alone: what is resolved in it is not taken for changed.
    alone = tmp_path / 'stage_1'
    alone.mkdir()
    shutil.copy(folder / 'config.py', alone)
    assert stage_config(alone, {'test_dataloader.batch_size': 3}).test_dataloader.batch_size == 3
    with pytest.raises(FileNotFoundError, match='eval_images can be changed in the config of the run'):
        stage_config(alone, {'eval_images': 'all'})


def test_the_last_stage_is_evaluated_where_the_training_data_are_gone(tiny_runs: list[Path], tmp_path: Path) -> None:
    cfg = Config.fromfile(tiny_runs[1] / 'config.py')
    cfg.train_dataset = dict(
        type='PascalVOCDataset', data_root=str(tmp_path), ann_file='gone.txt', data_prefix=dict(img_path='gone')
    )
    cfg.dump(tmp_path / 'config.py')
    for stage in ('stage_0', 'stage_1'):
        (tmp_path / stage).mkdir()
        shutil.copy(tiny_runs[1] / stage / 'snapshot.pth', tmp_path / stage)
    commands.main(['test', str(tmp_path), '--stage', 'last'])
    (again,) = json.loads((tmp_path / 'test/test.json').read_text())
    first = json.loads((tiny_runs[1] / 'results.json').read_text())['stages'][1]
    assert (again['stage'], again['iou'], again['counted']) == (1, first['iou'], first['counted'])


def test_resuming_a_finished_run_trains_nothing(trained: Path, shapes_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.glob('stage_*/*')}
    options = ['--work-dir', str(trained), '--resume', '--cfg-options', f'data_root={shapes_root}', *SMALL]
    result = call('tools/train_incremental.py', 'configs/sats/segformer_tiny_shapes_3-1.py', *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in trained.glob('stage_*/*')} == before


def test_a_config_that_does_not_exist(tmp_path: Path) -> None:
    result = call('tools/train_incremental.py', 'configs/sats/nothing.py', '--work-dir', str(tmp_path))
    assert result.returncode != 0
    assert 'configs/sats/nothing.py does not exist' in result.stderr


def test_a_stage_that_does_not_exist(trained: Path) -> None:
    result = call('tools/test_incremental.py', str(trained), '--stage', '7')
    assert result.returncode != 0
    assert 'stage_7/snapshot.pth does not exist: expected one of stages 0, 1' in result.stderr


@pytest.mark.slow
def test_two_processes_on_a_cpu(shapes_root: Path, tmp_path: Path) -> None:
    result = run(
        'bash', 'tools/dist_train.sh', 'configs/sats/segformer_tiny_shapes_3-1.py', '2',
        '--work-dir', str(tmp_path / 'run'), '--cfg-options', f'data_root={shapes_root}', *SMALL,
        OMP_NUM_THREADS='1', PORT='29517',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / 'run/results.json').read_text())
    assert len(results['stages']) == 2
    assert result.stdout.count('learned in stage') == 1  # one rank speaks


@pytest.mark.slow
def test_a_memory_is_the_same_on_one_and_two_processes(shapes_root: Path, tmp_path: Path) -> None:
    options = ['--cfg-options', f'data_root={shapes_root}', *SMALL, 'protocol=3-1', 'memory=10']
    one = train('sats/segformer_tiny_shapes_3-1_m', tmp_path / '1', *options)
    assert one.returncode == 0, one.stdout[-3000:] + one.stderr[-3000:]
    two = run(
        'bash', 'tools/dist_train.sh', 'configs/sats/segformer_tiny_shapes_3-1_m.py', '2',
        '--work-dir', str(tmp_path / '2'), *options, OMP_NUM_THREADS='1', PORT='29519',
    )  # fmt: skip
    assert two.returncode == 0, two.stdout[-3000:] + two.stderr[-3000:]
    for stage in range(4):
        kept = [(tmp_path / n / f'stage_{stage}/exemplars.json').read_bytes() for n in '12']
        assert kept[0] == kept[1]
        assert len(json.loads(kept[0])['exemplars']) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ('protocol', 'stages'), [('15-1', 6), ('15-5', 2), ('5-3', 6), ('10-1', 11)]
)
def test_segformer_b2_runs_every_protocol_on_photographs(
    protocol: str, stages: int, tmp_path: Path
) -> None:
    """Two iterations and five evaluation images a stage, by --cfg-options alone."""
    options = [
        f'data_root={shared_path("data/voc_mini")}', 'train_list=ImageSets/Segmentation/train.txt',
        'train_masks=SegmentationClass', 'pretrained=None', 'batch_size=2', 'crop_size=64',
        'num_workers=1', 'epochs=1', 'train_dataloader.num_batch_per_epoch=2',
        'test_dataloader.num_batch_per_epoch=5',
    ]  # fmt: skip
    result = train(f'sats/segformer_b2_voc_{protocol}', tmp_path, '--cfg-options', *options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    results = json.loads((tmp_path / 'results.json').read_text())
    assert len(results['stages']) == stages
    last = load_checkpoint_safely(tmp_path / f'stage_{stages - 1}/snapshot.pth')['state_dict']
    assert last['decode_head.conv_seg.weight'].shape[0] == 21
