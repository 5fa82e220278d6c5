# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Progress: plain lines in the log, a display in a terminal, all stages on one axis."""

import io
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.visualization import Visualizer
from mmengine.visualization.vis_backend import BaseVisBackend
from mmseg.registry import DATASETS, VISBACKENDS
from rich.console import Console

from mmseg_sats.engine import ProgressHook
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.run_plan import (
    StagePlan,
    build_protocol,
    find_incremental_dataset,
    plan_run,
    time_left,
)
from mmseg_sats.visualization import OneAxisVisBackend


@VISBACKENDS.register_module()
class RememberingVisBackend(BaseVisBackend):
    """Keeps what it is told."""

    told: list = []

    @property
    def experiment(self) -> Any:
        return self

    def _init_env(self) -> None:
        pass

    def add_scalars(self, scalar_dict: dict, step: int = 0, *args: Any, **kwargs: Any) -> None:
        self.told.append((Path(self._save_dir), step, scalar_dict))

    def close(self) -> None:
        self.told.append('closed')


@pytest.fixture
def log(tiny_runs: list[Path]) -> str:
    (file,) = (tiny_runs[0] / 'stage_1').glob('*/*.log')
    return file.read_text()


def test_the_plan_is_what_the_stages_do(tiny_runs: list[Path]) -> None:
    init_default_scope('mmseg')
    cfg = Config.fromfile(tiny_runs[0] / 'config.py')
    stage = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    dataset = DATASETS.build(stage.train_dataloader.dataset)
    assert find_incremental_dataset(SimpleNamespace(datasets=[dataset])) is dataset
    assert find_incremental_dataset(SimpleNamespace(parts=dict(stage=dataset))) is dataset
    assert find_incremental_dataset(SimpleNamespace()) is None
    plans = plan_run(cfg, dataset, tiny_runs[0])
    results = json.loads((tiny_runs[0] / 'results.json').read_text())['stages']
    for plan, result in zip(plans, results, strict=True):
        assert list(plan.classes) == result['new_classes']
        assert plan.images == result['images']
        (scalars,) = (tiny_runs[0] / f'stage_{plan.index}').glob('*/vis_data/scalars.json')
        last = json.loads(scalars.read_text().splitlines()[-1])
        assert plan.iterations == last['iter']


def test_time_left_adds_up_the_stages_to_come() -> None:
    plans = [StagePlan(i, (), 0, iterations) for i, iterations in enumerate((100, 20, 30))]
    assert time_left(plans, 0, 40, 100, 0.5) == (30.0, 55.0)
    assert time_left(plans, 2, 30, 30, 0.5) == (0.0, 0.0)
    assert time_left([], 0, 40, 100, 0.5) == (30.0, 30.0)


def test_plain_lines_stand_in_the_log(log: str, tiny_runs: list[Path]) -> None:
    stage = json.loads((tiny_runs[0] / 'results.json').read_text())['stages'][1]
    names = ', '.join(stage['new_classes'])
    assert f'stage 1 (of 0 to 1): {stage["images"]} images, learns {names}' in log
    told = re.search(
        r'stage 1 \(of 0 to 1\), epoch 2 of 2: ce [\d.]+, attention [\d.e-]+, output [\d.]+, '
        r'loss [\d.]+; training left: 0:00:00 for the stage, about 0:00:00 for the run', log)
    assert told
    assert f'stage 1 (of 0 to 1) is done: mIoU base {stage["mIoU"]["base"]:.2f}' in log
    assert 'Epoch(train)' in log  # mmengine's lines are as they were


class Hub:
    """The losses that mmengine keeps."""

    def __init__(self) -> None:
        values = {'train/loss': 3.0, 'train/decode.loss_ce': 1.0, 'train/loss_attention': 2.0,
                  'train/time': 0.1}
        self.log_scalars = {name: HistoryBuffer([value], [1]) for name, value in values.items()}


@pytest.fixture
def runner(tiny_runs: list[Path]) -> SimpleNamespace:
    """As much of a Runner as the hook looks at, in stage 1 of the run."""
    init_default_scope('mmseg')
    cfg = Config.fromfile(tiny_runs[0] / 'stage_1/config.py')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    logger = logging.Logger('progress')
    logger.addHandler(logging.StreamHandler(sys.stdout))
    return SimpleNamespace(
        cfg=cfg, work_dir=str(tiny_runs[0] / 'stage_1'), logger=logger, message_hub=Hub(),
        train_dataloader=SimpleNamespace(dataset=dataset), iter=0, max_iters=6, epoch=0, max_epochs=2)


def test_a_terminal_gets_a_display_that_fits_it(
    runner: SimpleNamespace, tiny_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    (handler,) = runner.logger.handlers
    handler.setStream(out)
    hook = ProgressHook(terminal=True)
    hook.console = Console(file=out, force_terminal=True, width=80, height=24)
    hook.before_train(runner)
    assert handler.level == logging.WARNING
    for runner.iter in range(6):
        runner.logger.info('one of many lines')
        hook.after_train_iter(runner, runner.iter)
    runner.logger.warning('look here')
    shown = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', out.getvalue())
    assert 'one of many lines' not in shown
    assert 'look here' in shown
    results = json.loads((tiny_runs[0] / 'results.json').read_text())['stages']
    assert f'{results[0]["mIoU"]["all"]:.2f}' in shown
    assert 'stage 1 (of 0 to 1): ' in shown
    assert 'loss: ce 1  attention 2  loss 3' in shown
    assert re.search(r'epoch 1 of 2   left: 0:0.:.. for the stage, about 0:0.:.. for the run', shown)
    hook.after_train(runner)
    assert handler.level == logging.NOTSET
    assert handler.stream is out
    assert '\x1b[?25h' in out.getvalue()  # the cursor is back
    display = Console(file=io.StringIO(), width=80)
    hook.rows = [[str(i), 'a class', '1.00', '2.00', '3.00'] for i in range(40)]
    display.print(hook._display(runner))
    lines = display.file.getvalue().splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80


def test_a_terminal_of_its_own_gets_the_display_and_nothing_else(
    runner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, rest = io.StringIO(), io.StringIO()
    monkeypatch.setattr(
        rich, '_console', Console(file=terminal, force_terminal=True, width=80, height=24))
    monkeypatch.setattr(sys, 'stdout', rest)
    (handler,) = runner.logger.handlers
    handler.setStream(rest)
    hook = ProgressHook()
    hook.before_train(runner)
    for runner.iter in range(6):
        print('one of many lines')
        hook.after_train_iter(runner, runner.iter)
    hook.after_train(runner)
    assert 'loss: ce 1  attention 2  loss 3' in terminal.getvalue()
    assert 'one of many lines' not in terminal.getvalue()
    assert rest.getvalue().count('one of many lines') == 6
    assert 'training left: 0:00:00' in rest.getvalue()  # the log goes on as without a display
    assert '\x1b' not in rest.getvalue()


def test_the_first_iteration_says_nothing_about_the_time_left(runner: SimpleNamespace) -> None:
    hook = ProgressHook(terminal=False)
    hook.before_train(runner)
    hook._started -= 3600  # the workers took an hour to start
    shown = []
    for runner.iter in range(2):
        hook.after_train_iter(runner, runner.iter)
        display = Console(file=io.StringIO(), width=80)
        display.print(hook._display(runner))
        shown.append(display.file.getvalue())
    assert 'left' not in shown[0]
    assert 'left: 0:00:0' in shown[1]


def test_a_file_gets_lines_alone(
    runner: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    (handler,) = runner.logger.handlers
    handler.setStream(sys.stdout)
    hook = ProgressHook(interval=3600)
    hook.before_train(runner)
    for runner.iter in range(6):
        hook.after_train_iter(runner, runner.iter)
    hook.after_train(runner)
    printed = capsys.readouterr().out
    assert '\x1b' not in printed
    assert len(printed.splitlines()) == 2  # what there is to do, and the last iteration


def test_a_stage_run_alone_knows_of_itself_only(runner: SimpleNamespace, tmp_path: Path) -> None:
    runner.work_dir = str(tmp_path / 'alone')
    hook = ProgressHook()
    hook.before_train(runner)
    assert hook.plans == []
    assert hook._where() == 'stage 1'


def test_all_stages_lie_on_one_axis(tmp_path: Path) -> None:
    RememberingVisBackend.told.clear()
    for stage, steps in enumerate(((50, 140), (10, 30), (5,))):
        visualizer = Visualizer(
            name=f'one_axis_{tmp_path}_{stage}',
            vis_backends=[dict(type='OneAxisVisBackend', backend=dict(type='RememberingVisBackend'))],
            save_dir=str(tmp_path / f'stage_{stage}/2026'),
        )
        for step in steps:
            visualizer.add_scalars(dict(loss=1.0), step=step, file_path='log.json')
        visualizer.close()
    scalars = [told for told in RememberingVisBackend.told if told != 'closed']
    assert [step for _, step, _ in scalars] == [50, 140, 150, 170, 175]
    assert {folder for folder, _, _ in scalars} == {tmp_path / 'vis_data'}
    # A stage that is gone on with counts from the same place.
    again = OneAxisVisBackend(dict(type='RememberingVisBackend'), str(tmp_path / 'stage_1/2027/vis_data'))
    assert again.offset == 140
    alone = OneAxisVisBackend(dict(type='RememberingVisBackend'), str(tmp_path / 'x/vis_data'))
    assert (alone.offset, alone.backend._save_dir) == (0, str(tmp_path / 'x/vis_data'))


def test_one_word_chooses_the_backend(shapes_cfg: Any, tmp_path: Path) -> None:
    cfg = shapes_cfg('sats', vis_backends='$wandb')
    protocol = build_protocol(cfg)
    stage = build_stage_config(cfg, protocol, protocol.stages[1], tmp_path)
    local, remote = stage.visualizer.vis_backends
    assert local.type == 'LocalVisBackend'
    runs = [
        OneAxisVisBackend(dict(remote.backend), str(tmp_path / f'stage_{k}/vis_data')).backend
        for k in (0, 1)
    ]
    words = [run._init_kwargs for run in runs]
    assert words[0] == words[1]
    assert words[0]['resume'] == 'allow'
    assert words[0]['project'] == 'mmseg_sats'


def test_tensorboard_reads_one_run(tmp_path: Path) -> None:
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in (0, 1):
        backend = OneAxisVisBackend(
            dict(type='TensorboardVisBackend'), str(tmp_path / f'stage_{stage}/2026/vis_data')
        )
        for step in (1, 2, 3):
            backend.add_scalars(dict(loss=float(step)), step=step)
        backend.close()
    events = EventAccumulator(str(tmp_path / 'vis_data')).Reload()
    assert [event.step for event in events.Scalars('loss')] == [1, 2, 3, 4, 5, 6]
