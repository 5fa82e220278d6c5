# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which file may import which: the order of the package's folders, and no circle among them."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmseg_sats'
# From the ground up. Those of one line stand side by side, and none of them imports another.
LAYERS = (
    ('functional',),
    ('models', 'datasets', 'evaluation'),
    ('visualization',),
    ('engine',),
    ('api',),
    ('commands',),
    ('tools', 'benchmarks', '__main__'),
)
MOST_FILES = 12


def modules() -> dict[str, Path]:
    """Dotted name to file, of the package and of the scripts above it."""
    files = [
        *(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts),
        *(ROOT / 'tools').glob('*.py'),
        *(ROOT / 'benchmarks').glob('*.py'),
    ]
    return {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in files}


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules of this project that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: a relative import, which this test does not follow'
            found |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # import_module('mmseg_sats.models...')
    # The package's own face gathers everything: that is no arrow of the file that imports from it.
    return {name for name in found if name in names or f'{name}.__init__' in names} - {'mmseg_sats'}


@pytest.fixture(scope='module')
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(path, set(known)) for name, path in known.items()}


def layer(module: str) -> int:
    """Number of the layer, 0 for the ground: protocol.py, version.py and utils/."""
    parts = module.removeprefix('mmseg_sats.').split('.')
    return next((number for number, row in enumerate(LAYERS, 1) if parts[0] in row), 0)


def test_imports_point_downwards(arrows: dict[str, set[str]]) -> None:
    wrong = []
    for module, targets in arrows.items():
        if module == 'mmseg_sats.__init__':
            continue
        for target in targets:
            same = module.split('.')[:2] == target.split('.')[:2] or not target.startswith('mmseg_sats.')
            if layer(target) > layer(module) or (layer(target) == layer(module) > 0 and not same):
                wrong.append(f'{module} -> {target}')
    assert wrong == []


def test_the_ground_is_files_that_import_one_another_alone(arrows: dict[str, set[str]]) -> None:
    ground = {name for name in arrows if layer(name) == 0 and name != 'mmseg_sats.__init__'}
    for name in ground:
        assert arrows[name] <= ground, name


def folder_of(module: str, parent: str) -> str | None:
    """The file or folder right under ``parent`` that a module belongs to."""
    if not module.startswith(f'{parent}.'):
        return None
    return module.removeprefix(f'{parent}.').split('.')[0]


def folders() -> list[str]:
    return sorted('.'.join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob('__init__.py')
                  if '.mim' not in path.parts)


@pytest.mark.parametrize('folder', folders())
def test_no_circle_in_a_folder(folder: str, arrows: dict[str, set[str]]) -> None:
    inner = defaultdict(set)
    for module, targets in arrows.items():
        own = folder_of(module, folder)
        for target in targets:
            other = folder_of(target, folder)
            # A folder's __init__ gathers what is in it, and belongs to it.
            if own and other and own != other and own != '__init__':
                inner[own].add(other)
    TopologicalSorter(inner).prepare()  # raises CycleError, which names the circle


# commands/ is a list: one file for each command, found by the command's name.
@pytest.mark.parametrize('folder', [name for name in folders() if name != 'mmseg_sats.commands'])
def test_a_folder_holds_a_dozen_things_at_most(folder: str) -> None:
    path = ROOT.joinpath(*folder.split('.'))
    things = [
        one for one in path.iterdir()
        if (one.suffix == '.py' and one.stem != '__init__') or (one / '__init__.py').exists()
    ]
    assert len(things) <= MOST_FILES, sorted(one.name for one in things)
