# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Modules of the user's own that a config names: where they are found, and what is said of one that is not."""

import multiprocessing
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_sats.engine.command_line import read_config
from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.run_plan import build_protocol
from mmseg_sats.utils import user_modules
from mmseg_sats.utils.user_modules import read_file

BASE = "_base_ = 'mmseg_sats::sats/segformer_tiny_shapes_3-1.py'\n"
IMPORTS = "custom_imports = dict(imports=['mmseg_sats', {!r}], allow_failed_imports=False)\n"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test adds to ``sys.path`` and imports is taken away; the current folder is an empty one."""
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    monkeypatch.setattr(user_modules, '_added', [])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], '__file__', None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_beside_the_config(tmp_path: Path) -> None:
    write(tmp_path / 'user/own_a.py', '')
    path = write(tmp_path / 'user/exp/own.py', BASE + IMPORTS.format('own_a'))
    with pytest.raises(ValueError, match='finds no module own_a'):
        read_config(path)
    write(tmp_path / 'user/exp/own_a.py', '')
    before = list(sys.path)
    assert read_config(path).import_folders == [str(tmp_path / 'user/exp')]
    assert sys.path == [*before, str(tmp_path / 'user/exp')]
    assert sys.modules['own_a'].__file__ == str(tmp_path / 'user/exp/own_a.py')


def test_beside_a_base_and_in_the_current_folder(tmp_path: Path) -> None:
    write(tmp_path / 'shared/own_b.py', '')
    write(tmp_path / 'empty/own_c.py', '')
    write(tmp_path / 'shared/method.py', "_base_ = 'mmseg_sats::sats/sats.py'\nmethod_imports = ['own_b', 'own_c']\n")
    bases = "_base_ = ['mmseg_sats::_base_/segformer_tiny_shapes.py', '../shared/method.py']\nprotocol = '3-1'\n"
    path = write(tmp_path / 'user/own.py', bases)
    assert read_config(path).import_folders == [str(tmp_path / 'shared'), str(tmp_path / 'empty')]


def test_above_the_package_that_the_config_lies_in(tmp_path: Path) -> None:
    write(tmp_path / 'user/own_d/a_loss.py', '')
    path = write(tmp_path / 'user/own_d/method/own.py', BASE + "method_imports = ['own_d.a_loss']\n")
    assert read_config(path).import_folders == [str(tmp_path / 'user')]


def test_an_option_may_name_a_module(tmp_path: Path) -> None:
    write(tmp_path / 'user/own_e.py', '')
    path = write(tmp_path / 'user/own.py', BASE)
    assert 'import_folders' not in read_config(path)
    assert read_config(path, dict(method_imports=['own_e'])).import_folders == [str(tmp_path / 'user')]


def test_what_python_finds_by_itself_is_taken_and_its_folder_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`yaml` is installed: a file of the user's of that name must not stand before it."""
    write(tmp_path / 'user/yaml.py', "raise RuntimeError('hidden')\n")
    write(tmp_path / 'other/own_f.py', '')
    monkeypatch.syspath_prepend(str(tmp_path / 'other'))
    path = write(tmp_path / 'user/own.py', BASE + "method_imports = ['yaml', 'own_f']\n")
    before = list(sys.path)
    assert read_config(path).import_folders == [str(tmp_path / 'other')]
    assert sys.path == before


def test_a_stages_config_remembers_the_folder(tmp_path: Path, laid_out_configs: None) -> None:
    write(tmp_path / 'user/own_g.py', '')
    cfg = read_config(write(tmp_path / 'user/own.py', BASE + "method_imports = ['own_g']\n"))
    protocol = build_protocol(cfg)
    stage = build_stage_config(cfg, protocol, protocol.stages[1], tmp_path / 'runs/run')
    path = write(tmp_path / 'runs/run/stage_1/config.py', stage.pretty_text)
    del sys.modules['own_g']
    sys.path.remove(str(tmp_path / 'user'))
    assert read_file(path).custom_imports['imports'] == ['mmseg_sats', 'own_g']
    assert sys.modules['own_g'].__file__ == str(tmp_path / 'user/own_g.py')


def test_a_module_that_is_nowhere_is_named_with_its_config_and_where_was_looked(tmp_path: Path) -> None:
    path = write(tmp_path / 'user/own.py', BASE + IMPORTS.format('own_h.losses'))
    with pytest.raises(ValueError, match='own_h') as told:
        read_config(path)
    message = str(told.value)
    assert message.startswith(f"custom_imports: Python finds no module own_h (of 'own_h.losses', which {path} names)")
    assert f'nor is it in {tmp_path / "user"}, ' in message
    assert str(tmp_path / 'empty') in message
    assert 'PYTHONPATH' in message
    assert '\n' not in message


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ('import re\n\nimport not_there\n', r"line 3: ModuleNotFoundError: No module named 'not_there'"),
        ('from torch import no_such_name\n', r"line 1: ImportError: cannot import name 'no_such_name' from .*"),
        ('x = 1\ndef f(:\n', r'line 2: SyntaxError: invalid syntax'),
        ("raise RuntimeError('two\\n  lines')\n", r'line 1: RuntimeError: two lines'),
        ("from mmengine.registry import HOOKS\n\n\n@HOOKS.register_module('IterTimerHook')\nclass A:\n    pass\n",
         r'line 4: KeyError: .*IterTimerHook is already registered.*'),
    ],
)  # fmt: skip
def test_an_error_within_a_module_is_one_line(tmp_path: Path, code: str, message: str) -> None:
    module = write(tmp_path / 'user/own_i.py', code)
    path = write(tmp_path / 'user/own.py', BASE + IMPORTS.format('own_i'))
    with pytest.raises(ValueError, match='own_i was found') as told:
        read_config(path)
    assert re.search(rf'{re.escape(str(module))}, {message}$', str(told.value)), told.value
    assert '\n' not in str(told.value)


def test_a_module_that_may_fail_is_warned_of(tmp_path: Path) -> None:
    imports = "custom_imports = dict(imports=['mmseg_sats', 'own_j'], allow_failed_imports=True)\n"
    with pytest.warns(UserWarning, match='ignored: custom_imports: Python finds no module own_j'):
        read_config(write(tmp_path / 'user/own.py', BASE + imports))


def test_two_modules_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for user in ('a', 'b'):
        write(tmp_path / user / 'own_k.py', '')
        write(tmp_path / user / 'own.py', BASE + "method_imports = ['own_k']\n")
    read_config(tmp_path / 'a/own.py')
    read_config(tmp_path / 'a/own.py')
    with pytest.raises(ValueError, match=r'own_k is \S+/b/own_k.py here, and \S+/a/own_k.py in a config'):
        read_config(tmp_path / 'b/own.py')


def test_a_trained_models_config_brings_its_modules(tmp_path: Path) -> None:
    write(tmp_path / 'trained/own_l.py', '')
    plain = Config.fromfile(Path(__file__).parents[1] / 'configs/_base_/models/segformer.py').model.to_dict()
    plain.update(type='EncoderDecoder')
    cfg = Config(dict(model=plain, custom_imports=dict(imports=['own_l'], allow_failed_imports=False)))
    write(tmp_path / 'trained/old.py', cfg.pretty_text)
    own = read_config(write(tmp_path / 'user/own.py', BASE + f"model_config = '{tmp_path / 'trained/old.py'}'\n"))
    protocol = build_protocol(own)
    stage = build_stage_config(own, protocol, protocol.stages[1], tmp_path / 'run')
    assert stage.import_folders == [str(tmp_path / 'trained')]
    assert stage.custom_imports['imports'] == ['mmseg_sats', 'own_l']


def test_a_spawned_process_finds_it_too(tmp_path: Path) -> None:
    """As the workers of a data loader are on some platforms: what they get is pickled."""
    write(tmp_path / 'user/own_m.py', 'def double(x):\n    return 2 * x\n')
    read_config(write(tmp_path / 'user/own.py', BASE + "method_imports = ['own_m']\n"))
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert pool.map(sys.modules['own_m'].double, [21]) == [42]
