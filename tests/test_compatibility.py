# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""docs/compatibility.md names what is public: the page and the code say the same, whichever of the two changes."""

import argparse
import csv
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mmengine.registry
import mmseg.registry
import pytest
from mmengine.hooks import Hook
from mmengine.registry import Registry

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats import functional
from mmseg_sats.datasets.memory.exemplars import Exemplar, Exemplars, write_exemplars
from mmseg_sats.engine.config.variables import RENAMED_VARIABLES, STAGE_VARIABLES
from mmseg_sats.utils.checkpoint import load_checkpoint_safely, read_json
from mmseg_sats.utils.config_keys import IDENTITY, KEYS
from tests.test_docs_commands import command_parsers, parser_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs/compatibility.md'
Row = tuple[str, ...]

# What is promised to be importable under these names.
IMPORTABLE = (
    'mmseg_sats.models.attention.AttentionMap',
    'mmseg_sats.models.losses.crp_loss',
    'mmseg_sats.models.losses.unbiased_cross_entropy',
    'mmseg_sats.models.losses.unbiased_distillation',
    'mmseg_sats.protocol.Protocol',
    'mmseg_sats.protocol.Stage',
    # What docs/new_method.md and docs/new_backbone.md tell people to import.
    'mmseg_sats.engine.unwrap',
    # What docs/python.md calls.
    'mmseg_sats.train',
    'mmseg_sats.load_run',
    'mmseg_sats.add_classes',
    'mmseg_sats.api.Run',
    'mmseg_sats.api.AddedClasses',
    'mmseg_sats.models.DistillationPart',
    'mmseg_sats.models.PseudoLabeler',
    'mmseg_sats.models.SegmentorOutput',
    'mmseg_sats.models.attention.WindowAttentionMap',
    'mmseg_sats.models.attention.Windows',
    'mmseg_sats.models.backbones.attend_with_map',
    'mmseg_sats.models.backbones.self_attention',
    'mmseg_sats.models.check_attention',
    'mmseg_sats.models.losses.over_ranks.sum_over_ranks',
    'mmseg_sats.models.pixel_losses.PixelChunk',
    'mmseg_sats.models.pixel_losses.PixelwiseDistillationLoss',
    'mmseg_sats.models.pixel_losses.PixelwiseSegmentationLoss',
    'mmseg_sats.Protocol',
    'mmseg_sats.Stage',
    *(f'mmseg_sats.functional.{name}' for name in functional.__all__),
)
# How the training loop tells the hook of checkpoints of a SIGTERM.
NOT_PUBLIC = [('before_stop(runner)',)]
# What contact sheets put in the place of mmseg's transforms for as long as they are drawn.
OF_CONTACT_SHEETS = {('LoadFullAnnotations', 'TRANSFORMS'), ('PackFullInputs', 'TRANSFORMS')}
# Variables between slurm_train.sh and the copy of it that slurm runs.
OWN_VARIABLES = {'MMSEG_SATS_TOOLS', 'SLURM_RESTART_COUNT'}
# mmengine's logs and checkpoints, and the report's pictures.
NOT_LISTED = re.compile(
    r'stage_k/(\d{8}_\d{6}(/.*|\.py)|epoch_\d+\.pth|iter_\d+\.pth|last_checkpoint)|report/.*\.(png|pdf)'
)
# Files that the runs of these tests have no reason to write, and the module that says their names.
SOMETIMES = {
    'stage_k/held_out.json': 'engine/hooks/best_epoch_hook.py',
    'stage_k/new_rows.npz': 'engine/hooks/methods/new_rows_hook.py',
    'stage_k/closed_form.npz': 'engine/hooks/methods/closed_form_hook.py',
    'stage_k/prototypes.npz': 'engine/hooks/methods/prototype_hook.py',
    'rehearsal.log': 'engine/checks/rehearsal.py',
}


def rows(heading: str, columns: int) -> set[Row]:
    """The first columns of a section's tables, code marks taken off."""
    (section,) = re.findall(rf'^## {heading}\n(.*?)(?=^## |\Z)', PAGE.read_text(encoding='utf-8'), re.M | re.S)
    lines = re.findall(r'^\| (?!---)(.*) \|$', section, re.M)
    cells = [tuple(cell.strip('`') for cell in line.split(' | ')[:columns]) for line in lines]
    found = [row for row, line in zip(cells, lines, strict=True) if line.startswith('`')]
    assert len(found) == len(set(found)), f'{heading}: a row twice'
    return set(found)


def check(heading: str, code: Iterable[Row]) -> None:
    page, code = rows(heading, len(next(iter(code)))), set(code)
    missing, unknown = sorted(code - page), sorted(page - code)
    assert not missing, f'docs/compatibility.md, "{heading}" lacks {missing}'
    assert not unknown, f'docs/compatibility.md, "{heading}" has {unknown}, which the code has not'


def registered() -> Iterator[Row]:
    for module in (mmengine.registry, mmseg.registry):
        for name, registry in vars(module).items():
            if isinstance(registry, Registry):
                for key, found in registry.module_dict.items():
                    if found.__module__.split('.')[0] == 'mmseg_sats':
                        yield key, name


def test_registered_names() -> None:
    importlib.import_module('mmseg_sats.visualization.contact_sheet')
    check('Registered names', set(registered()) - OF_CONTACT_SHEETS)


def test_importable_names() -> None:
    check('Importable names', [(name,) for name in IMPORTABLE])
    for name in IMPORTABLE:
        module, _, item = name.rpartition('.')
        assert callable(getattr(importlib.import_module(module), item)), name  # no module in its place


def test_hook_methods() -> None:
    """Those that are called beside mmengine's own."""
    calls = [
        (name, ', '.join(['runner', *re.findall(r', (\w+)=', arguments)]))
        for path in (ROOT / 'mmseg_sats').rglob('*.py')
        for name, arguments in re.findall(r"call_hook\('(\w+)'(.*)\)", path.read_text())
    ]
    own = [(f'{name}({arguments})',) for name, arguments in calls if not hasattr(Hook, name)]
    check('Hook methods', [row for row in own if row not in NOT_PUBLIC])


def test_config_keys() -> None:
    check('Config keys', [(key.name, key.read_by, key.scope, key.meaning) for key in KEYS])


def test_variables() -> None:
    stage = [(f'${name}', meaning) for name, meaning in STAGE_VARIABLES.items()]
    renamed = [(f'${old}', f'${new}') for old, new in RENAMED_VARIABLES.items()]
    check('Variables', stage + renamed)


def arguments_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What a command takes: options, and arguments in capitals."""
    for action in parser._actions:
        if action.dest != 'help' and action.help != argparse.SUPPRESS:
            yield action.option_strings[-1] if action.option_strings else action.dest.upper()


def words_of_shell(script: Path) -> Iterator[str]:
    """What a shell script takes: arguments in capitals, and variables of the environment."""
    text = script.read_text()
    yield from re.search(rf'tools/{script.name} ([A-Z ]+?) \[args', text)[1].split()
    yield from (f'${name}' for name in set(re.findall(r'\$\{([A-Z_]+):-', text)) - OWN_VARIABLES)


def test_commands() -> None:
    found = [(name, word) for name, parser in command_parsers().items() for word in arguments_of(parser)]
    found += [(path.name, word) for path in (ROOT / 'tools').glob('*.sh') for word in words_of_shell(path)]
    check('Commands', found)


def test_scripts_are_commands() -> None:
    """And take the same words."""
    commands = {str(parser.get_default('run')): name for name, parser in command_parsers().items()}
    scripts = {path: parser_of(path) for path in (ROOT / 'tools').glob('*.py')}
    names = {path: commands[str(parser.get_default('run'))] for path, parser in scripts.items()}
    check('Scripts', [(path.name, name) for path, name in names.items()])
    for path, parser in scripts.items():
        assert list(arguments_of(parser)) == list(arguments_of(command_parsers()[names[path]]))


def test_files_of_a_run(tiny_runs: list[Path]) -> None:
    files = {path.relative_to(run) for run in tiny_runs for path in run.rglob('*') if path.is_file()}
    written = {re.sub(r'^stage_\d+/', 'stage_k/', path.as_posix()) for path in files}
    written = {name for name in written if not NOT_LISTED.fullmatch(name)}
    for name, module in SOMETIMES.items():
        assert repr(Path(name).name) in (ROOT / 'mmseg_sats' / module).read_text(), name
    check('Files of a run', [(name,) for name in written | set(SOMETIMES)])


def fields(value: Any, path: str = '') -> Iterator[str]:
    """Dotted paths of a file's values; ``CLASS`` for each class, weights and lists of plain values whole."""
    if isinstance(value, dict) and value and not path.endswith('state_dict'):
        for name, item in value.items():
            yield from fields(item, f'{path}.CLASS' if path.endswith('iou') else f'{path}.{name}'.lstrip('.'))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            yield from fields(item, f'{path}[]')
    else:
        yield path


def test_fields_of_these_files(tiny_runs: list[Path], tmp_path: Path) -> None:
    run = tiny_runs[0]
    write_exemplars(tmp_path / 'exemplars.json', Exemplars(0, 'A', 1, 0, 1, (Exemplar('a', None, ('b',)),)))
    contents = {
        'results.json': read_json(run / 'results.json') | dict.fromkeys(IDENTITY),
        'metrics.json': read_json(run / 'stage_1/metrics.json'),
        'exemplars.json': read_json(tmp_path / 'exemplars.json'),
        'snapshot.pth': load_checkpoint_safely(run / 'stage_1/snapshot.pth'),
    }
    found = {(name, field) for name, content in contents.items() for field in fields(content)}
    with (run / 'results.csv').open() as file:
        found |= {('results.csv', column) for column in next(csv.reader(file))}
    check('Fields of these files', found)


@pytest.mark.parametrize('change', ['added', 'taken out'])
def test_a_difference_is_named(change: str) -> None:
    code = [(f'${name}', meaning) for name, meaning in STAGE_VARIABLES.items()]
    code += [(f'${old}', f'${new}') for old, new in RENAMED_VARIABLES.items()]
    code = [*code, ('$added', 'a new one')] if change == 'added' else code[1:]
    expected = r'lacks .*\$added' if change == 'added' else r"has .*\$stage'.*which the code has not"
    with pytest.raises(AssertionError, match=expected):
        check('Variables', code)
