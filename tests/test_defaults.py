# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a run's config need not say."""

import inspect
from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.visualization.report.page import OPTIONS, check_report_options, write_report


@pytest.mark.parametrize(
    ('name', 'method', 'work_dir'),
    [
        ('sats/small.py', 'sats', 'work_dirs/sats/small'),
        ('./configs/sats/small.py', 'sats', 'work_dirs/sats/small'),
        ('small.py', 'small', 'work_dirs/small'),
    ],
)
def test_method_and_work_dir_come_from_the_path(
    name: str, method: str, work_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text('epochs = 1\n')
    cfg = Config.fromfile(name)
    set_defaults(cfg)
    assert (cfg.method, cfg.memory, cfg.work_dir) == (method, 0, work_dir)


def test_what_is_said_stays() -> None:
    said = dict(method='A', memory=20, work_dir='B')
    cfg = Config(dict(said))
    set_defaults(cfg)
    assert cfg._cfg_dict.to_dict() == said


def test_a_config_that_is_in_no_file_is_unnamed() -> None:
    cfg = Config(dict(work_dir=None))
    set_defaults(cfg)
    assert (cfg.method, cfg.work_dir) == ('unnamed', 'work_dirs/unnamed')


def test_the_report_has_its_defaults_from_one_place() -> None:
    parameters = inspect.signature(write_report).parameters
    assert check_report_options({}) == OPTIONS == {name: parameters[name].default for name in OPTIONS}
    runtime = Config.fromfile(Path(__file__).parents[1] / 'configs/_base_/default_runtime.py')
    assert runtime.report == {}
