# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""`mmseg-sats`: what it answers before torch is imported, and the configs that it knows by name."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmseg_sats import commands
from mmseg_sats.commands import COMMANDS, build_parser, main, report, script, table
from mmseg_sats.engine.command_line import read_config
from mmseg_sats.engine.experiments.tables import TABLE_DATASETS, TABLES
from mmseg_sats.utils.installed import CONFIGS, TOOLS, config_names, find_config
from mmseg_sats.visualization.report.page import OPTIONS

ROOT = Path(__file__).parents[1]
SHAPES = 'sats/segformer_tiny_shapes_3-1'
# Heavy is what takes a second to import, and whatever pulls it in.
HELP = """
import contextlib, io, runpy, sys
from mmseg_sats.commands import main

def helps(call, *words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            call(*words)
        except SystemExit as stopped:
            assert not stopped.code, words
    assert out.getvalue().startswith('usage: '), words

for command in {commands}:
    helps(main, [*command.split(), '--help'])
for script in {scripts}:
    helps(runpy.run_path(script)['main'], ['--help'])
heavy = {{'torch', 'mmengine', 'mmcv', 'mmseg', 'numpy', 'matplotlib', 'rich'}}
print(sorted(heavy & {{name.split('.')[0] for name in sys.modules}}))
"""
WITHOUT_MMSEG = """
import sys
from mmseg_sats.commands import main

class Absent:
    def find_spec(self, name, *_):
        if name == 'mmseg':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Absent())
main(['check', 'sats/segformer_tiny_shapes_3-1'])
"""


def python(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', text], cwd=ROOT, text=True, capture_output=True,
                          check=False)


def test_every_help_comes_without_torch() -> None:
    scripts = sorted(map(str, (ROOT / 'tools').glob('*.py')))
    commands = ['', *COMMANDS, 'prepare voc', 'prepare ade20k']
    done = python(HELP.format(commands=commands, scripts=scripts))
    assert done.stdout == '[]\n', done.stderr[-2000:]


def test_without_mmseg_one_line_says_what_to_install() -> None:
    done = python(WITHOUT_MMSEG)
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert "mmseg is not installed: `pip install 'mmseg_sats[mm]'`" in done.stderr


def test_a_command_runs_in_a_process_that_has_the_package() -> None:
    with pytest.raises(SystemExit, match="nothing is no run's folder"):
        main(['test', 'nothing'])
    with pytest.raises(SystemExit, match='checkpoint a does not exist'):
        script('convert_mit', ['a', 'b'])


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['trian'], r"unknown command 'trian' (did you mean 'train'?); expected one of train, add, test,"),
        (['convert_mit'], r"(did you mean 'convert-mit'?)"),
        ([], 'the following arguments are required: COMMAND'),
        (['prepare', 'coco', 'downloads'], "invalid choice: 'coco'"),
        (['train', SHAPES, '--cfg-options', 'epochs'], '--cfg-options epochs: expected KEY=VALUE'),
    ],
)
def test_what_is_no_command_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_may_be_named() -> None:
    """From any folder; a file of that name comes first."""
    assert find_config(SHAPES) == find_config(f'{SHAPES}.py') == ROOT / f'configs/{SHAPES}.py'
    cfg = read_config(SHAPES, {'epochs': 3})
    assert (cfg.filename, cfg.epochs) == (str(ROOT / f'configs/{SHAPES}.py'), 3)
    assert (CONFIGS, TOOLS) == (ROOT / 'configs', ROOT / 'tools')


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'sats').mkdir()
    (tmp_path / f'{SHAPES}.py').touch()
    monkeypatch.chdir(tmp_path)
    assert find_config(f'{SHAPES}.py') == Path(f'{SHAPES}.py')


@pytest.mark.parametrize('given', ['sats/segformer_tiny_shape_3-1', 'configs/sats/segformer_tiny_shapes_31.py'])
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(given: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"config {given} does not exist \(did you mean '{SHAPES}'"):
        read_config(given)


def test_names_are_those_of_runs() -> None:
    names = config_names()
    assert {SHAPES, 'sats/segformer_b2_voc_15-1', 'joint/segformer_b2_voc_15-1'} <= set(names)
    assert not [name for name in names if name.startswith('_base_') or name == 'sats/sats']


def test_a_config_anywhere_inherits_from_ours(tmp_path: Path) -> None:
    """As if it had named the file: mmengine's mark of another package's registries is taken off."""
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = 'mmseg_sats::{SHAPES}.py'\nprotocol = '3-3'\n")
    by_path = tmp_path / 'by_path.py'
    by_path.write_text(f"_base_ = '{ROOT}/configs/{SHAPES}.py'\nprotocol = '3-3'\n")
    assert read_config(own).to_dict() == read_config(by_path).to_dict()
    # From Python it is the runner that takes the mark off.
    cfg = Config.fromfile(own)
    assert cfg.model._scope_ == 'mmseg_sats'
    cfg.merge_from_dict(dict(work_dir=str(tmp_path / 'run'), data_root=str(tmp_path / 'data'), train_images=24,
                             val_images=12, image_size=64, crop_size=64))
    assert '_scope_' not in RUNNERS.build(cfg).cfg.pretty_text


def test_what_the_help_says_is_what_there_is() -> None:
    assert tuple(TABLES) == table.TABLES
    assert tuple(TABLE_DATASETS) == table.DATASETS
    parser = build_parser()
    given = parser.parse_args(['report', 'a'])
    assert given.run is report.run
    assert dict(images=given.images, attention=given.attention) == OPTIONS


@pytest.mark.parametrize('words', ['predict run/stage_1 a.png', 'export run/stage_1', 'test run', 'table 1', 'demo'])
def test_where_a_command_cannot_write_is_said_before_it_works(words: str, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match=rf'--out {tmp_path}/file/out cannot be written to: Not a directory'):
        main([*words.split(), '--out', f'{tmp_path}/file/out'])


def test_figures_of_the_stages_measured_so_far_are_kept(
    tiny_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(folder: Path, *_: object) -> dict:
        if folder.name == 'stage_1':
            raise ValueError('the second stage fails')
        return dict(stage=0)

    monkeypatch.setattr('mmseg_sats.engine.experiments.evaluate_again.evaluate_again', evaluate)
    with pytest.raises(SystemExit, match='the second stage fails'):
        main(['test', str(tiny_runs[1]), '--out', str(tmp_path)])
    assert json.loads((tmp_path / 'test.json').read_text()) == [dict(stage=0)]


def test_a_process_that_ran_commands_looks_for_garbage_once_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    at_end: list[Callable] = []
    monkeypatch.setattr(commands.atexit, 'register', at_end.append)
    monkeypatch.setattr(commands.atexit, 'unregister', lambda one: at_end.remove(one) if one in at_end else None)
    for _ in range(3):
        assert commands._run(argparse.Namespace(run=lambda _: None)) == 0
    done: list[str] = []
    for name in ('collect', 'freeze'):
        monkeypatch.setattr(commands.gc, name, lambda name=name: done.append(name))
    for one in at_end:
        one()
    assert done == ['collect', 'freeze']
