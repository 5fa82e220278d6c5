# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Every command in the README and the docs: its tool exists, and takes the words that it is given."""

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_sats.commands import build_parser
from mmseg_sats.engine.checks.preflight import known_keys
from mmseg_sats.utils.installed import find_config

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ('README.md', 'CONTRIBUTING.md')), *sorted((ROOT / 'docs').glob('*.md'))]
COMMAND = r'(?:[A-Z_]+=\S+ +)*(?:python3?|mmseg-sats|bash|make|pip|source|git|pre-commit|cd) '
# Commands that no parser of ours can judge, by their first words.
NOT_PARSED = {
    'pip': "pip's own command line; what is installed is tested in test_packaging.py",
    'python -m pip': "pip's own command line",
    'python -m pytest': "pytest's own command line",
    'source': "the shell's own",
    'cd': "the shell's own",
    'git': "git's own command line",
    'pre-commit': "pre-commit's own command line; its hooks are make targets",
}
# Words that stand for more of the same.
PLACEHOLDER = re.compile(r'^(\.\.\.|…)$')


def commands_in(text: str) -> Iterator[str]:
    """Commands in indented blocks, in fenced shell blocks and in inline code; && parts them."""
    text = re.sub(r'\\\n\s*', ' ', text)
    python_blocks = re.compile(r'^```python\n.*?^```', re.M | re.S)
    text = python_blocks.sub('', text)
    lines = re.findall(rf'^(?: {{4}}|\t)\$? ?({COMMAND}.*)$', text, re.M)
    for block in re.findall(r'^```(?:bash|shell|sh|console)\n(.*?)^```', text, re.M | re.S):
        lines += re.findall(rf'^\$? ?({COMMAND}.*)$', block, re.M)
    without_blocks = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    without_blocks = re.sub(r'^(?: {4}|\t).*$', '', without_blocks, flags=re.M)
    inline = re.findall(r'`([^`\n]+)`', without_blocks)
    lines += [code for code in inline if re.match(COMMAND, code)]
    for line in lines:
        yield from (part.strip() for part in line.split('&&'))


FOUND = [
    pytest.param(command, id=f'{page.relative_to(ROOT)}: {command[:70]}')
    for page in PAGES
    if page.exists()
    for command in commands_in(page.read_text(encoding='utf-8'))
]


class _Parser(Exception):  # noqa: N818  carries what was looked for
    """A tool's parser, caught before it reads the command line."""


@cache
def parser_of(script: Path) -> argparse.ArgumentParser:
    """The argument parser of a tool, without running the tool."""
    spec = importlib.util.spec_from_file_location(f'{script.stem}_for_docs', script)
    module = importlib.util.module_from_spec(spec)

    def caught(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Parser(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', [str(script.parent), *sys.path])
        spec.loader.exec_module(module)
        for name in ('parse_args', 'parse_known_args'):
            patch.setattr(argparse.ArgumentParser, name, caught)
        try:
            module.main()
        except _Parser as found:
            return found.args[0]
    raise AssertionError(f'{script.name} reads no command line')


@cache
def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of `mmseg-sats`; of `prepare`, that of each data set."""

    def leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        if parser._subparsers is None:
            yield name, parser
            return
        for word, inner in parser._subparsers._group_actions[0].choices.items():
            yield from leaves(inner, f'{name} {word}'.strip())

    return dict(leaves(build_parser(), ''))


def words_of(command: str) -> list[str]:
    """The words after variables; a synopsis' [optional] parts count as given, of a|b the first."""
    words = shlex.split(re.sub(r'[\[\]](?!\S*\.jpg)', ' ', command), comments=True)
    words = [re.sub(r'^([\w-]+)(\|[\w-]+)+$', r'\1', word) for word in words]
    while re.match(r'^[A-Z_]+=', words[0]):
        words = words[1:]
    # One capital letter stands for a number (--stage K), or for anything at all.
    words = ['1' if re.fullmatch('[A-Z]', word) else word for word in words]
    return [word for word in words if not PLACEHOLDER.match(word)]


def parse_command(words: list[str], command: str) -> argparse.Namespace:
    """The words after `mmseg-sats`; a mention without a command, or with COMMAND for any of them, gives none."""
    if not words or words[0] in ('COMMAND', '--help', '--version'):
        return argparse.Namespace()
    for count in (2, 1):
        parser = command_parsers().get(' '.join(words[:count]))
        if parser is not None:
            return parse(parser, words[count:], command)
    raise AssertionError(f'mmseg-sats has no such command: {command}')


def parse(parser: argparse.ArgumentParser, words: list[str], command: str) -> argparse.Namespace:
    given = [option.split('=')[0] for option in words if option.startswith('--')]
    unknown = [option for option in given if option not in parser._option_string_actions]
    assert not unknown, f'there is no {unknown}: {command}'
    try:
        return parser.parse_args(words)
    except SystemExit:
        # A mention that names the tool alone, as prose does, gives no arguments to judge.
        if words:
            raise AssertionError(f'not taken: {command}') from None
        return argparse.Namespace()


def check_config(args: argparse.Namespace) -> None:
    """A config of ours that is named exists, and has, or a run reads, the values that --cfg-options change."""
    path = getattr(args, 'config', None)
    if path is None or not re.match(r'configs/|\w+/[\w-]+$', str(path)):
        return
    try:
        cfg = Config.fromfile(find_config(str(path).removeprefix('configs/')))
    except FileNotFoundError as error:
        raise AssertionError(str(error)) from error
    for key in getattr(args, 'cfg_options', None) or {}:
        assert key.split('.')[0] in known_keys(cfg), f'{path} has no {key}'


def make_targets() -> set[str]:
    return set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M))


@pytest.mark.parametrize('command', FOUND)
def test_the_command_is_one_that_there_is(command: str) -> None:
    words = words_of(command)
    if any(words[: len(start.split())] == start.split() for start in NOT_PARSED):
        return
    if words[0] == 'make':
        targets = [word for word in words[1:] if '=' not in word]
        assert set(targets) <= make_targets(), command
        return
    for start in (['mmseg-sats'], ['python', '-m', 'mmseg_sats']):
        if words[: len(start)] == start:
            check_config(parse_command(words[len(start) :], command))
            return
    script = ROOT / words[1]
    assert script.is_file(), f'{words[1]} does not exist: {command}'
    arguments = words[2:]
    if script.suffix == '.sh':
        # CONFIG GPUS args, and PARTITION JOB CONFIG args: the rest goes to the training script.
        arguments = {
            'dist_train.sh': lambda w: [w[0], *w[2:]],
            'slurm_train.sh': lambda w: w[2:],
        }[script.name](arguments)
        script = ROOT / 'tools/train_incremental.py'
    check_config(parse(parser_of(script), arguments, command))


def test_commands_were_found() -> None:
    scripts = {param.values[0].split()[1] for param in FOUND if len(param.values[0].split()) > 1}
    assert {'tools/dist_train.sh', 'train', 'export', 'demo'} <= scripts
    assert len(FOUND) > 20


@pytest.mark.parametrize(
    'command',
    [
        'python tools/train_incremental.py configs/sats/segformer_b2_voc_15-1.py --workdir D',
        'python tools/nothing.py',
        'mmseg-sats nothing',
        'mmseg-sats train sats/none',
        'mmseg-sats train sats/segformer_b2_voc_15-1 --workdir D',
        'mmseg-sats prepare coco DOWNLOADS',
        'make nothing',
        'python tools/train_incremental.py configs/sats/none.py',
        'python tools/train_incremental.py configs/sats/segformer_b2_voc_15-1.py --cfg-options epoch=3',
        'bash tools/dist_train.sh configs/sats/segformer_b2_voc_15-1.py 4 --launch slurm',
    ],
)
def test_a_command_that_drifted_is_noticed(command: str) -> None:
    with pytest.raises(AssertionError):
        test_the_command_is_one_that_there_is(command)


def test_a_continued_line_is_one_command() -> None:
    text = 'As in\n\n    A=1 \\\n        bash tools/dist_train.sh C 2 \\\n        --amp\n\nand so on.\n'
    (command,) = commands_in(text)
    assert words_of(command) == ['bash', 'tools/dist_train.sh', '1', '2', '--amp']


def test_the_first_training_of_the_readme_runs_as_it_stands() -> None:
    """The environment is activated above it, and it needs neither data nor weights."""
    commands = list(commands_in((ROOT / 'README.md').read_text(encoding='utf-8')))
    (first, *_) = (row for row, command in enumerate(commands) if command.startswith('mmseg-sats train'))
    assert words_of(commands[first - 1]) == ['source', '.venv/bin/activate']
    args = parse_command(words_of(commands[first])[1:], commands[first])
    cfg = Config.fromfile(find_config(args.config))
    cfg.merge_from_dict(args.cfg_options)
    assert cfg.dataset == 'shapes'
    assert cfg.pretrained is None
    assert (cfg.epochs, cfg.train_dataloader.num_batch_per_epoch) == (1, 2)


def test_indented_code_fits_on_a_page() -> None:
    wide = [
        f'{page.name}: {line}'
        for page in PAGES
        for line in page.read_text(encoding='utf-8').splitlines()
        if len(line) > 110 and line.startswith(('    ', '\t'))
    ]
    assert not wide


def test_every_tool_is_mentioned() -> None:
    text = '\n'.join(page.read_text(encoding='utf-8') for page in PAGES if page.exists())
    tools = [path.name for path in (ROOT / 'tools').iterdir() if path.is_file()]
    assert not [tool for tool in tools if tool not in text]
