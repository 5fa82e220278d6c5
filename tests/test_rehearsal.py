# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The rehearsal before a run: what it finds, where nothing was trained yet, and that it leaves no trace."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, RUNNERS
from mmengine.visualization import Visualizer
from mmseg.registry import MODELS, TASK_UTILS
from PIL import Image
from torch import nn

from mmseg_sats.datasets.memory.selection import ClassBalancedMemory
from mmseg_sats.engine.checks import rehearsal
from mmseg_sats.engine.checks.rehearsal_runner import largest_and_smallest
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.test_bad_input import CONFIG, LABELS, LOAD, PACK, draw
from tools.train_incremental import main

ROOT = Path(__file__).parents[1]


@MODELS.register_module()
class FailsWithFiveChannels(nn.Module):
    """A part of the distillation that works until the second class is added."""

    def forward(self, student: object, teacher: object, labels: torch.Tensor) -> torch.Tensor:
        """Fails in the third stage of 3-1."""
        if student.logits.shape[1] > 5:
            raise IndexError('index 5 is out of bounds')
        return student.logits.sum() * 0


@HOOKS.register_module()
class SavesAFunction(Hook):
    """Writes a checkpoint that cannot be read without running code."""

    def before_save_checkpoint(self, runner: object, checkpoint: dict) -> None:
        """Adds a function."""
        checkpoint['mine'] = print


@HOOKS.register_module()
class FailsAfterTheStage(Hook):
    """A hook of the user's that is called once the stage is evaluated."""

    def after_stage(self, runner: object, stage: object, metrics: dict) -> None:
        """Asks for a metric that does not exist."""
        metrics['mIoU_olds']


@HOOKS.register_module()
class Misspelt(Hook):
    """A hook that would never be called."""

    def after_stages(self, runner: object) -> None:
        """Nothing calls it."""


@TASK_UTILS.register_module()
class PicksNothingThatExists(ClassBalancedMemory):
    """A memory that fails when it is asked the first time."""

    def select(self, candidates: object, stage: int) -> object:
        """Fails."""
        raise KeyError('herding')


def add_image(data: Path, size: tuple[int, int], name: str = '12') -> None:
    """Adds an evaluation image of another size (height, width)."""
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2] = 1
    Image.fromarray(mask).save(data / f'masks/{name}.png')
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(data / f'images/{name}.png')
    with (data / 'val.txt').open('a') as names:
        names.write(f'{name}\n')


class Case(NamedTuple):
    """What the config says besides, what the message says, and what is done to the data."""

    config: str
    message: str
    spoil: Callable[[Path], object] = lambda data: None


RESIZE = dict(type='Resize', scale=(64, 64), keep_ratio=False)
CASES = {
    'labels resized': Case(
        f'test_pipeline = {[LOAD, LABELS, RESIZE, PACK]}',
        r'stage 0 would fail in evaluation .*images/\d+\.png: prediction has shape \(32, 32\), its label \(64, 64\): '
        r'expected LoadAnnotations in the transforms of the evaluation, behind Resize',
    ),
    'no labels': Case(
        f'test_pipeline = {[LOAD, RESIZE, PACK]}',
        r'stage 0 would fail in evaluation .*\.png has no label: expected LoadAnnotations in the transforms of the '
        r'evaluation, behind Resize',
    ),
    'two sizes in a batch': Case(
        'test_dataloader = dict(batch_size=2)',
        r'stage 0 would fail in evaluation \(.*12\.png and .*\): .* expected test_dataloader\.batch_size=1',
        lambda data: add_image(data, (40, 48)),
    ),
    'a tiny image': Case(
        '',
        r'stage 0 would fail in evaluation \(.* and .*images/12\.png\): .* the image is too small',
        lambda data: add_image(data, (8, 16)),
    ),
    'a loss that fails in a later stage': Case(
        "distillation = dict(mine=dict(type='FailsWithFiveChannels'))",
        r'stage 2 would fail in training: IndexError: index 5 is out of bounds',
    ),
    'a checkpoint that runs code': Case(
        "custom_hooks = [dict(type='SavesAFunction')]",
        r'stage 0 would fail in training: ValueError: .*epoch_1\.pth',
    ),
    'a hook at the end of a stage': Case(
        "custom_hooks = [dict(type='FailsAfterTheStage')]",
        r'stage 0 would fail in the end of the stage: KeyError: mIoU_olds',
    ),
    'a memory that fails': Case(
        "memory = 6\nmemory_selection = dict(type='PicksNothingThatExists')",
        r'stage 0 would fail in the choice of exemplars: KeyError: herding',
    ),
    'optimizer misspelt': Case(
        "later_stages = {'optim_wrapper.optimizer.type': 'AdamV'}",
        r'stage 1 would fail in training, optim_wrapper: .*expected an optimizer of torch as optim_wrapper\.optimizer',
    ),
    'argument of the optimizer misspelt': Case(
        "later_stages = {'optim_wrapper.optimizer.lrr': 1}",
        r"stage 1 .*, optim_wrapper: .*unexpected keyword argument 'lrr' \(did you mean 'lr'\?\)",
    ),
    'schedule misspelt': Case(
        "later_stages = dict(param_scheduler=[dict(type='PolyLRR')])",
        r"stage 1 .*, param_scheduler: .*PolyLRR is not in the .* registry \(did you mean 'PolyLR'\?\)",
    ),
    'hook misspelt': Case(
        "later_stages = dict(custom_hooks=[dict(type='NoHookOfThatName')])",
        r'stage 1 .*, a hook: .*NoHookOfThatName is not in the .* registry; is the module that registers it in custom_',
    ),
    'argument of a hook misspelt': Case(
        "later_stages = {'default_hooks.logger.intervall': 3}",
        r"stage 1 .*, a hook: .*LoggerHook.*'intervall' \(did you mean 'interval'\?\)",
    ),
    'name of a hook misspelt': Case(
        'default_hooks = dict(chekpoint=dict(interval=3))',
        r'stage 0 .*, a hook: .*expected the name of a hook or part that the config has, or a type',
    ),
    'a moment misspelt': Case(
        "custom_hooks = [dict(type='Misspelt')]",
        r"stage 0 .*, a hook: .*Misspelt\.after_stages is called by nothing \(did you mean 'after_stage'\?\)",
    ),
    'a schedule that follows a number that there is not': Case(  # mmengine 1124
        "held_out = 0.5\nparam_scheduler = [dict(type='ReduceOnPlateauLR', monitor='mIoU_al')]",
        r"stage 0 .*, param_scheduler: .*ReduceOnPlateauLR: .* no 'mIoU_al' \(did you mean 'mIoU_all'\?\)",
    ),
    'an error without a message': Case(  # mmsegmentation 1623
        "optim_wrapper = dict(constructor='LearningRateDecayOptimizerConstructor', paramwise_cfg=dict("
        "_delete_=True, decay_rate=0.9, decay_type='stage_wise', num_layers=12))",
        r'stage 0 .*, optim_wrapper: NotImplementedError: \(raise NotImplementedError\(\), in add_params\)',
    ),
    'weights for some classes': Case(
        'segmentation_loss = dict(class_weight=[1.0, 2.0, 3.0, 4.0])',
        r'model\.decode_head\.loss_decode\.class_weight has 4 values: expected one for each of the 7 classes',
    ),
    'a weight for a class that does not exist': Case(
        "segmentation_loss = dict(class_weight=dict(a=2.0, cc=3.0))",
        r"loss_decode\.class_weight: the data set has no class 'cc' \(did you mean 'c'\?\)",
    ),
}  # fmt: skip


@pytest.fixture(scope='module')
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('rehearsal') / 'data'
    draw(folder)
    return folder


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config over own images: three stages, the evaluation of which sees eight of them."""

    def write(text: str = '', spoil: Callable[[Path], object] = lambda data: None) -> Path:
        data = shutil.copytree(drawn, tmp_path / 'data')
        spoil(data)
        path = tmp_path / 'own.py'
        base = CONFIG.replace("protocol = '3-1'", "protocol = '2-2'").replace('rehearsal = None', 'rehearsal = dict()')
        path.write_text(f'{base.format(configs=ROOT / "configs", data=data)}report = None\n{text}\n')
        return path

    return write


@pytest.mark.parametrize('case', [pytest.param(case, id=name) for name, case in CASES.items()])
def test_what_fails_later_fails_before_training(
    case: Case, own: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ['train', str(own(case.config, case.spoil)), '--work-dir', str(tmp_path / 'run')]
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit, match=case.message) as stopped:
        main()
    assert '\n' not in str(stopped.value).strip()
    left = [path.name for path in (tmp_path / 'run').glob('*')]
    assert left in ([], [rehearsal.LOG])


def state() -> tuple:
    """What a process would notice of a run: random numbers, global objects, files of its cache, switches of torch."""
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    objects = [list(manager._instance_dict) for manager in (MMLogger, Visualizer)]
    return *numbers, objects, torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()


def weights(run: Path) -> list[dict[str, torch.Tensor]]:
    """The snapshots of a run."""
    return [load_checkpoint_safely(path)['state_dict'] for path in sorted(run.glob('stage_*/snapshot.pth'))]


def test_it_leaves_no_trace(shapes_cfg: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple, tuple]] = []
    rehearse = rehearsal.rehearse

    def watched(*args: object) -> None:
        before = state()
        rehearse(*args)
        seen.append((before, state()))

    monkeypatch.setattr('mmseg_sats.engine.incremental_runner.rehearse', watched)
    # Four stages, so that a model is handed on to the last, with a memory and a validation.
    options = dict(memory=6, held_out=0.3, eval_images='all', train_images=30, val_images=6)
    runs = {}
    for name, value in (('with', {}), ('without', None)):
        cfg = shapes_cfg('sats', name, **options)
        cfg.rehearsal = value
        RUNNERS.build(cfg).train()
        runs[name] = Path(cfg.work_dir)
    ((before, after),) = seen
    assert before == after
    one, other = weights(runs['with']), weights(runs['without'])
    assert len(one) == len(other) == 4
    assert all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a)
    listed = [{path.relative_to(run).as_posix() for path in run.rglob('*')} for run in runs.values()]
    assert {name for name in listed[0] ^ listed[1] if not name.split('/')[1][:4].isdigit()} == set()


def test_it_is_left_out_where_a_run_goes_on_unchanged(
    shapes_cfg: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(rehearsal.Rehearsal, 'run_all', lambda self: calls.append(self.work_dir))
    cfg = shapes_cfg('finetune', protocol='3-3', rehearsal={})
    RUNNERS.build(cfg).train()
    assert calls == [Path(cfg.work_dir) / rehearsal.FOLDER]
    cfg.resume = True
    RUNNERS.build(cfg).train()
    assert len(calls) == 1
    cfg.num_workers = 1
    RUNNERS.build(cfg).train()
    assert len(calls) == 2


@pytest.mark.parametrize('method', ['cit', 'dft', 'nest', 'sdr', 'ssul'])
def test_what_a_stage_needs_is_handed_on_to_the_last(method: str, shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg(method, protocol='1-1', train_images=40, rehearsal={}, memory=6)
    runner = RUNNERS.build(cfg)
    (runner.work_dir / rehearsal.FOLDER / 'stage_0').mkdir(parents=True)  # of one that was killed
    rehearsal.rehearse(runner.cfg, runner._work, runner.logger)
    assert not list(runner.work_dir.iterdir())


def test_largest_and_smallest_image(drawn: Path, tmp_path: Path) -> None:
    class Images:
        def __init__(self, *sizes: tuple[int, int]) -> None:
            self.paths = [str(tmp_path / f'{index}.png') for index in range(len(sizes))]
            for path, size in zip(self.paths, sizes, strict=True):
                Image.new('RGB', size).save(path)

        def __len__(self) -> int:
            return len(self.paths)

        def get_data_info(self, index: int) -> dict:
            return dict(img_path=self.paths[index])

    assert largest_and_smallest(Images((9, 9), (8, 20), (3, 4), (9, 9))) == [1, 2]
    assert largest_and_smallest(Images((9, 9), (9, 9))) == [0]
    assert largest_and_smallest([7, 8, 9]) == [2, 0]


def test_weights_per_class_follow_the_stage(shapes_cfg: Callable[..., Config]) -> None:
    cfg = shapes_cfg('mib', protocol='3-1', class_order=[3, 1, 2, 6, 5, 4])
    cfg.model.decode_head.loss_decode = dict(type='CrossEntropyLoss', class_weight=[0.5, 1, 2, 3, 4, 5, 6])
    runner = RUNNERS.build(cfg)
    given = [runner._work.config(stage).model.decode_head.loss_decode.class_weight for stage in runner.protocol.stages]
    assert given[0] == [0.5, 3, 1, 2]
    assert given[-1] == [0.5, 3, 1, 2, 6, 5, 4]
    cfg.model.decode_head.loss_decode.class_weight = {'background': 0.1, 'striped star': 7}
    names = runner._work.config(runner.protocol.stages[0])
    assert names.model.decode_head.loss_decode.class_weight == [0.5, 3, 1, 2]  # the run has a copy of its config
    runner = RUNNERS.build(cfg)
    assert runner._work.config(runner.protocol.stages[0]).model.decode_head.loss_decode.class_weight == [0.1, 1, 1, 7]


def test_mmengines_own_checkpoint_hook_in_place_of_ours(
    shapes_cfg: Callable[..., Config], capsys: pytest.CaptureFixture
) -> None:
    cfg = shapes_cfg('finetune', protocol='3-3')
    cfg.merge_from_dict(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=True, interval=1))))
    RUNNERS.build(cfg).train()
    assert 'default_hooks.checkpoint is CheckpointHook' in capsys.readouterr().out
    assert (Path(cfg.work_dir) / 'stage_1/epoch_1.pth').exists()
