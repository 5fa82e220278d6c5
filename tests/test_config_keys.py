# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The table of config keys: it has every key that a config sets or the code reads, and no other."""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.hooks import test_time_aug_hook
from mmengine.runner import Runner

from mmseg_sats.engine.checks.preflight import check_cfg_options, check_config
from mmseg_sats.engine.config.variables import STAGE_VARIABLES
from mmseg_sats.utils.config_keys import IDENTITY, KEYS, STAGE_PARTS, is_harmless, names

ROOT = Path(__file__).parents[1]
TABLE = {key.name for key in KEYS}
SOURCES = sorted([*(ROOT / 'mmseg_sats').rglob('*.py'), *(ROOT / 'tools').glob('*.py')])
READERS = ('get', 'pop', 'setdefault')

# Values for another key, which a person chooses on the command line: 'vis_backends=$wandb'.
CHOICES = ('tensorboard', 'wandb', 'centre_crop_pipeline', 'class_order_b')

Found = dict[str, str]  # key to the place where it was found


@cache
def configs() -> dict[str, ast.Module]:
    """Every file below configs/. All of them are read as text, which is quicker by far than mmengine's inheritance."""
    paths = sorted((ROOT / 'configs').rglob('*.py'))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding='utf-8')) for path in paths}


@cache
def keys_set() -> Found:
    """Every top-level key of our configs."""
    assigned = (
        (node.id, place)
        for place, tree in configs().items()
        for statement in tree.body
        for target in getattr(statement, 'targets', ())
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and node.id != '_base_'
    )
    return dict(assigned)


@cache
def variables_used() -> Found:
    """Every ``$name`` in our configs, without what only a stage knows."""
    words = (
        (node.value, place)
        for place, tree in configs().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    found = {word[1:]: place for word, place in words if re.fullmatch(r'\$\w+', word)}
    return {name: place for name, place in found.items() if name not in STAGE_VARIABLES}


@cache
def keys_read() -> Found:
    """Every key that our code reads from a config by name."""
    trees = {path: ast.parse(path.read_text(encoding='utf-8')) for path in SOURCES}
    annotated = [node for tree in trees.values() for node in functions(tree) if node.returns]
    returns = {node.name: ast.unparse(node.returns) for node in annotated}
    return {
        key: f'{path.relative_to(ROOT)}:{line}'
        for path, tree in trees.items()
        for function in functions(tree)
        for key, line in reads(function, returns)
        if not key.startswith('_')  # an attribute of mmengine's own
    }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def reads(function: ast.FunctionDef, returns: dict[str, str]) -> Iterator[tuple[str, int]]:
    """``cfg.x``, ``cfg['x']``, ``cfg.get('x')`` and the like of what is a Config by its annotation or origin.

    Args:
        function: where to look.
        returns: our functions' annotations of what they return.
    """
    arguments = [*function.args.args, *function.args.kwonlyargs]
    held = {arg.arg for arg in arguments if arg.annotation and ast.unparse(arg.annotation) == 'Config'}

    def is_config(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == '_cfg_dict':
            return is_config(node.value)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == 'copy.deepcopy':
                return is_config(node.args[0])
            if name.endswith('_cfg_dict.to_dict'):
                return is_config(node.func.value)
            return name in ('Config', 'Config.fromfile', 'StageConfig') or returns.get(name) == 'Config'
        return ast.unparse(node) in held or ast.unparse(node).endswith(('self.cfg', 'runner.cfg'))

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, made = node.targets[0], ast.unparse(node.value).split('(')[0]
            if is_config(node.value):
                held.add(ast.unparse(target))
            elif isinstance(target, ast.Tuple) and returns.get(made, '').startswith('tuple[Config,'):
                held.add(ast.unparse(target.elts[0]))
    methods = {*dir(Config), *dir(ConfigDict), '_cfg_dict'}
    for node in ast.walk(function):
        key = None
        if isinstance(node, ast.Attribute) and is_config(node.value) and node.attr not in methods:
            key = node.attr
        elif isinstance(node, ast.Subscript) and is_config(node.value):
            key = getattr(node.slice, 'value', None)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_config(node.func.value):
            key = getattr(node.args[0], 'value', None) if node.func.attr in READERS else None
        if isinstance(key, str):
            yield key, node.lineno


@cache
def keys_of_mmengine() -> Found:
    """What mmengine's Runner, its hook for test-time augmentation and its reader of configs look up."""
    text = ''.join(map(inspect.getsource, (Runner, test_time_aug_hook, Config)))
    found = [*inspect.signature(Runner).parameters, *re.findall(r"cfg\w*(?:\.get\(\s*|\[)'(\w+)'", text)]
    return dict.fromkeys(found, 'mmengine')


def test_every_key_that_a_config_sets_is_in_the_table() -> None:
    assert len(keys_set()) > 50
    missing = {key: place for key, place in keys_set().items() if key not in TABLE}
    assert not missing, 'add a row to mmseg_sats/utils/config_keys.py'


def test_every_variable_of_a_config_is_in_the_table() -> None:
    missing = {name: place for name, place in variables_used().items() if name not in TABLE}
    assert not missing, 'add a row to mmseg_sats/utils/config_keys.py'


def test_every_key_that_the_code_reads_is_in_the_table() -> None:
    assert {'held_out', 'runner_type', 'model_config', 'base', 'replay_share'} <= set(keys_read())
    missing = {key: place for key, place in keys_read().items() if key not in TABLE}
    assert not missing, 'add a row to mmseg_sats/utils/config_keys.py'


def test_every_key_of_the_table_is_set_or_read() -> None:
    used = {*keys_set(), *variables_used(), *keys_read(), *keys_of_mmengine(), *STAGE_PARTS}
    unused = TABLE - used
    assert not unused, 'nothing sets or reads these: take their rows out of mmseg_sats/utils/config_keys.py'


def test_the_column_of_readers_is_right() -> None:
    mmengine, config = set(names(read_by='mmengine')), set(names(read_by='config'))
    assert mmengine <= set(keys_of_mmengine())
    assert config <= {*variables_used(), *CHOICES}
    assert mmengine | config | set(names(read_by='package')) == TABLE


def test_a_row_for_each_key_and_a_meaning_in_each_row() -> None:
    assert len(TABLE) == len(KEYS)
    assert all(key.meaning and not key.meaning.endswith('.') for key in KEYS)


def test_what_the_runner_alone_is_told_is_the_same_in_all_stages() -> None:
    assert set(names(scope='runner')) == {'runner_type', 'base', 'launcher', 'rehearsal'}
    assert set(STAGE_PARTS) == {'initial_stage', 'later_stages', 'method_initial_stage', 'method_later_stages'}
    assert IDENTITY[0] == 'method'


@pytest.mark.parametrize('key', sorted(TABLE - set(names(scope='stage'))))
def test_a_stage_cannot_have_what_belongs_to_the_run(key: str) -> None:
    with pytest.raises(ValueError, match=rf'later_stages\.{key}: all stages of a run have the same {key}'):
        check_config(Config(dict(later_stages={key: None})))


def test_an_option_for_a_key_that_is_read_needs_no_value_in_the_config() -> None:
    check_cfg_options(Config(dict(model=None)), dict(held_out=0.2))
    with pytest.raises(KeyError, match='the config has no'):
        check_cfg_options(Config(dict(model=None)), dict(head_lr_mult=2))


def test_a_letter_at_the_end_names_a_variant_and_is_no_slip() -> None:
    check_config(Config(dict(class_order_c=[1, 2], crop2=3)))
    with pytest.raises(KeyError, match="did you mean 'class_order'"):
        check_config(Config(dict(class_ordr=[1, 2])))


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('num_workers', True), ('report', True), ('report.images', True), ('work_dir', True), ('wandb', True),
        ('default_hooks.logger.interval', True), ('test_dataloader.num_workers', True),
        ('train_dataloader.timeout', True), ('', False), ('reports', False), ('default_hooks', False),
        ('default_hooks.finite.type', False), ('base', False), ('train_dataloader.batch_size', False),
        ('model.graph_old_model', True), ('later_stages.model.graph_old_model', True), ('model.unknown', False),
    ],
)  # fmt: skip
def test_what_may_change_with_resume(path: str, expected: bool) -> None:
    assert is_harmless(path) == expected
