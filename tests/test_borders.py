# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What lies between two stages: done once, shown once, and let go."""

import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger, print_log
from mmengine.optim.optimizer import default_constructor
from mmengine.registry import HOOKS, RUNNERS, DefaultScope
from mmengine.runner import Runner
from mmengine.runner.runner import _SlicedDataset
from mmengine.visualization import Visualizer
from mmseg.registry import DATASETS
from mmseg.visualization import SegLocalVisualizer

from mmseg_sats.datasets.class_index.index import ClassIndex
from mmseg_sats.datasets.shapes.dataset import ShapesDataset
from mmseg_sats.engine import StageRunner
from mmseg_sats.engine.config import config_text
from mmseg_sats.engine.config.config_text import StageConfig
from mmseg_sats.engine.hooks.methods import image_pass
from mmseg_sats.engine.run_plan import find_incremental_dataset
from mmseg_sats.models.segmentors.old_model import OldModel
from mmseg_sats.utils.shared_values import Sharing, once

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[1]
MANAGERS = (MMLogger, MessageHub, Visualizer, SegLocalVisualizer, DefaultScope)
SEEN: dict[str, Any] = {}


@HOOKS.register_module()
class BorderWatch(Hook):
    """Notes, as a stage begins, what is left of those before it; may stop stage 1 in its first iteration."""

    stop = False

    def before_stage(self, runner: Runner, stage: object) -> None:
        SEEN.setdefault('left', []).append([ref() is not None for ref in SEEN.get('models', [])])
        SEEN.setdefault('managed', []).append([len(m._instance_dict) for m in MANAGERS])
        model = runner.model
        SEEN.setdefault('models', []).extend(
            weakref.ref(part) for part in (model, runner.visualizer, model.old_model) if part is not None
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if runner.work_dir.endswith('stage_1') and runner.iter == 0:
            SEEN['old model in stage 1'] = SEEN['calls']['old model']
            if self.stop:
                raise KeyboardInterrupt


def counted(patch: pytest.MonkeyPatch, owner: Any, attribute: str, name: str, calls: Counter) -> None:
    real = getattr(owner, attribute)

    def wrapper(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return real(*args, **options)

    patch.setattr(owner, attribute, wrapper)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often was done what should be done once."""
    SEEN.clear()
    SEEN['calls'] = calls = Counter()
    counted(monkeypatch, ShapesDataset, 'load_data_list', 'list', calls)
    counted(monkeypatch, ClassIndex, 'load_or_scan', 'class index', calls)
    counted(monkeypatch, OldModel, '__call__', 'old model', calls)
    counted(monkeypatch, config_text, '_laid_out', 'layout', calls)
    counted(monkeypatch, StageConfig, '__init__', 'stage config', calls)
    monkeypatch.setattr(BorderWatch, 'stop', False)
    return calls


def make(shapes_cfg: MakeConfig, **options: Any) -> Config:
    cfg = shapes_cfg('sats', **options)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='BorderWatch')]
    return cfg


def test_a_run_does_once_what_can_be_done_once(
    shapes_cfg: MakeConfig,
    calls: Counter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(default_constructor, 'print_log', print_log)  # which the tests leave out
    stages = 4
    RUNNERS.build(make(shapes_cfg)).train()
    # Of training and of evaluation images, for all stages and all looks at each.
    assert (calls['list'], calls['class index']) == (2, 2)
    # The plan of the run (once), the checks and the stages.
    assert calls['stage config'] == 3 * stages
    # About seven texts a stage were laid out whole; now a text's values, where they are new.
    keys = len(Config.fromfile(tmp_path / 'run/config.py'))
    assert calls['layout'] <= (stages + 1) * keys
    # No model outlives its stage, and no name of mmengine's managers either.
    assert [any(left) for left in SEEN['left']] == [False] * stages
    assert [len(left) for left in SEEN['left']] == [0, 2, 5, 8]
    assert SEEN['managed'][1:] == [SEEN['managed'][1]] * (stages - 1)

    screen = capsys.readouterr().out
    (log,) = (tmp_path / 'run/stage_1').glob('*/*.log')
    for words in ('System environment:', 'Config:\n', 'Hooks will be executed', 'paramwise_options'):
        assert words in log.read_text()
        assert words not in screen
    assert 'stage 1 of 4: 3 old classes, 1 new' in screen
    start = screen[screen.index('stage 1 of 4') :]
    assert len(start[: start.index('Epoch(train)')].splitlines()) < 24


def test_thresholds_take_one_pass_and_none_when_resumed(
    shapes_cfg: MakeConfig, calls: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BorderWatch, 'stop', True)
    with pytest.raises(KeyboardInterrupt):
        RUNNERS.build(make(shapes_cfg, protocol='3-3')).train()
    passed = SEEN['old model in stage 1']
    monkeypatch.setattr(BorderWatch, 'stop', False)
    calls.clear()
    results = RUNNERS.build(make(shapes_cfg, protocol='3-3', resume=True)).train()
    assert passed == results['stages'][1]['images'] > 0  # by batches of one image
    assert SEEN['old model in stage 1'] == 0


@pytest.mark.usefixtures('laid_out_configs')
@pytest.mark.parametrize(
    'path',
    ['sats/segformer_tiny_shapes_3-1_m', 'ssul/segformer_b2_voc_15-1', 'recall/segformer_b2_voc_15-1',
     'sats/vit_b_upernet_voc_15-1', 'plop/segformer_b2_ade20k_100-10'],
)  # fmt: skip
def test_a_config_has_the_text_that_mmengine_gives_it(path: str) -> None:
    cfg = Config.fromfile(ROOT / f'configs/{path}.py')
    assert config_text.config_text(cfg) == cfg.pretty_text


@pytest.mark.usefixtures('laid_out_configs')
def test_a_stages_config_has_the_text_that_mmengine_gives_it(tmp_path: Path) -> None:
    content = dict(
        z=1, a=dict(), b=[], c=None, d='$word', e={'not a name': 1, '3': dict(x=[1, dict(y=(2,))])},
        f=[[1, 2], ['a' * 90]], string='it\'s "quoted"',
    )  # fmt: skip
    cfg = StageConfig(content)
    assert cfg.pretty_text == Config(content).pretty_text
    cfg.z = True  # equal to 1, and another text
    assert 'z = True' in cfg.pretty_text
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').z is True


def test_values_are_shared_only_while_sharing() -> None:
    sharing, made = Sharing(), Counter()

    def make_(name: str) -> object:
        made[name] += 1
        return object()

    assert once('a', lambda: make_('a')) is not once('a', lambda: make_('a'))
    with sharing:
        first = once(('a', dict(x=1)), lambda: make_('b'))
        assert once(('a', dict(x=1)), lambda: make_('b')) is first
        assert once(('a', dict(x=2)), lambda: make_('c')) is not first
        with Sharing():
            assert once(('a', dict(x=1)), lambda: make_('d')) is not first
        with pytest.raises(ZeroDivisionError):
            once('fails', lambda: 1 / 0)
        assert once('fails', lambda: 2) == 2
    with sharing:
        assert once(('a', dict(x=1)), lambda: make_('b')) is first
    sharing.forget()
    with sharing:
        assert once(('a', dict(x=1)), lambda: make_('b')) is not first
    assert made == dict(a=2, b=2, c=1, d=1)


def test_the_stages_images_are_found_behind_a_slice(tiny_runs: list[Path]) -> None:
    """``num_batch_per_epoch``: progress told of stage 0 all along."""
    cfg = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert find_incremental_dataset(_SlicedDataset(dataset, 2)) is dataset
    whole = SimpleNamespace(parts=dict(stage=dataset))
    assert find_incremental_dataset(_SlicedDataset(whole, 2)) is dataset


def test_the_screen_gets_warnings_whatever_they_say(
    tiny_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    cfg.work_dir, cfg.experiment_name = str(tmp_path), 'screen'
    runner = StageRunner.from_cfg(cfg)
    runner.logger.warning('Config: odd')
    runner.logger.warning('"FileClient" will be deprecated in future.')
    runner.logger.info('Config: even')
    out = capsys.readouterr().out
    assert 'Config: odd' in out
    assert 'FileClient' not in out
    assert not re.search('Config: even|processes: 1', out)
    (log,) = tmp_path.glob('*/*.log')
    assert re.search('processes: 1', log.read_text())


def test_a_pass_over_images_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(image_pass, 'training_images_once', lambda _: {})
    monkeypatch.setattr(image_pass, 'print_log', lambda text, **_: said.append(text))
    runner = SimpleNamespace(build_dataloader=lambda _: ['a', 'b'])
    assert list(image_pass.images_seen_once(runner, 'looking')) == ['a', 'b']
    assert said == []  # it took no time
    monkeypatch.setattr(image_pass, 'INTERVAL', 0.0)
    assert list(image_pass.images_seen_once(runner, 'looking')) == ['a', 'b']
    assert said == ['looking: image 1 of 2', 'looking: image 2 of 2']
