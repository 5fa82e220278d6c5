# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Requirements, setup.py and the Makefile; no test here installs anything or needs the network."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

from mmseg_sats.version import __version__

ROOT = Path(__file__).parents[1]
IMPORT_NAMES = {'opencv-python': 'cv2', 'pillow': 'PIL'}
MM_IMPORT_NAMES = {'mmengine', 'mmcv', 'mmseg'}

PYTHON_STUB = """#!/bin/sh
case "$*" in
    '-m venv --clear .venv') rm -rf .venv; mkdir -p .venv/bin; cp venv_python .venv/bin/python ;;
    *) exec '{python}' "$@" ;;
esac
"""
# Notes its calls; the files `no-index` and `no-display` make it fail.
VENV_PYTHON_STUB = """#!/bin/sh
[ "$*" = '-c ' ] && exit
echo "$*" >> calls
case "$*" in
    *opencv-python-headless) rm no-display ;;
    *' install '*) [ ! -e no-index ] ;;
    *'import cv2'*) [ ! -e no-display ] ;;
esac
"""


def distributions(name: str) -> list[str]:
    """The distributions that ``requirements/<name>.txt`` names."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [re.match(r'[\w.-]+', line)[0] for line in lines if line and not line.startswith('#')]


def is_mm(distribution: str) -> bool:
    return re.search(r'mm(cv|engine|seg)', distribution, re.IGNORECASE) is not None


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py says to setuptools."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **given: arguments.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path('setup.py')
    return arguments


def test_setup_depends_on_no_distribution_of_mm(setup_arguments: dict[str, Any]) -> None:
    assert setup_arguments['install_requires']
    assert not [name for name in setup_arguments['install_requires'] if is_mm(name)]
    assert len([name for name in setup_arguments['extras_require']['mm'] if is_mm(name)]) == 3
    assert not [name for name in distributions('runtime') if is_mm(name)]


def test_setup_takes_version_and_packages_from_the_tree(setup_arguments: dict[str, Any]) -> None:
    assert setup_arguments['version'] == __version__
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / 'mmseg_sats').rglob('*.py')}
    packages = {'.'.join(folder.parts) for folder in folders}
    assert set(setup_arguments['packages']) == packages
    assert 'mmseg_sats.models.losses' in packages


def test_files_that_are_no_modules_are_installed_too(setup_arguments: dict[str, Any]) -> None:
    patterns = {
        ROOT.joinpath(*package.split('.'), pattern)
        for package, given in setup_arguments['package_data'].items()
        for pattern in given
    }
    files = [path for path in (ROOT / 'mmseg_sats').rglob('*')
             if path.is_file() and path.suffix not in ('.py', '.pyc')]
    assert ROOT / 'mmseg_sats/visualization/report/templates/report.html.j2' in files
    manifest = (ROOT / 'MANIFEST.in').read_text()
    for path in files:
        assert any(path.match(str(pattern)) for pattern in patterns), path
        assert f'*{path.suffix}' in manifest


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / 'requirements' / 'constraints.txt').read_text().splitlines()
    pins = [re.match(r'([\w.-]+)==[\w.]+(; python_version >= "3\.\d+")?$', line)
            for line in lines if not line.startswith('#')]
    assert all(pins), 'a constraint is not NAME==VERSION'
    pinned = {pin[1].lower() for pin in pins}
    for name in ('runtime', 'mm', 'tests', 'dev', 'onnx', 'voc', 'docs'):
        assert {distribution.lower() for distribution in distributions(name)} <= pinned


def test_every_import_is_required() -> None:
    known = {IMPORT_NAMES.get(name, name) for name in distributions('runtime')}
    known |= MM_IMPORT_NAMES | {'mmseg_sats'} | set(sys.stdlib_module_names)
    known |= {'triton'}  # CUDA builds of torch bring it; nothing imports it without a GPU
    unknown = set()
    for path in [*(ROOT / 'mmseg_sats').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            unknown |= {(path.name, module) for module in modules
                        if module.split('.')[0] not in known}
    assert not unknown, 'add to requirements/runtime.txt what imports these'


# --- the Makefile, with stubs for Python ---


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh clone's packaging files, and a `python` whose virtual environments are stubs."""
    if shutil.which('make') is None:
        pytest.skip('make is not installed')
    for name in ('Makefile', 'setup.py', 'requirements.txt'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    write_script(tmp_path / 'python', PYTHON_STUB.format(python=sys.executable))
    write_script(tmp_path / 'venv_python', VENV_PYTHON_STUB)
    return tmp_path


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a fresh shell, even when the tests themselves run under make."""
    own = ('PYTHON', 'PIP_ARGS', 'ARGS', 'TEST_JOBS', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL')
    env = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(['make', 'PYTHON=./python', *words], cwd=folder, env=env, text=True,
                          capture_output=True, check=False)


def calls(folder: Path) -> list[str]:
    """What the stub of .venv/bin/python was asked to do since the last look."""
    path = folder / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_make_installs_once_and_again_only_for_new_requirements(checkout: Path) -> None:
    assert make(checkout, 'demo').returncode == 0
    first = calls(checkout)
    assert ['install' in call for call in first] == [True, True, False, False]
    assert '-c requirements/constraints.txt -r requirements.txt' in first[0]
    assert '--no-deps' in first[1]
    assert first[-1] == '-W ignore tools/demo.py'
    assert make(checkout, 'demo').returncode == 0
    assert calls(checkout) == ['-W ignore tools/demo.py']
    later = (checkout / '.venv' / '.installed').stat().st_mtime + 10
    os.utime(checkout / 'requirements' / 'constraints.txt', (later, later))
    assert make(checkout, 'venv').returncode == 0
    assert 'install' in calls(checkout)[0]


def test_make_docs_brings_its_own_requirements_and_nobody_else_waits(checkout: Path) -> None:
    assert make(checkout, 'test').returncode == 0
    assert not any('docs.txt' in call for call in calls(checkout))
    assert make(checkout, 'docs').returncode == 0
    done = calls(checkout)
    assert done[0].endswith('-r requirements/docs.txt')
    assert done[1] == '-W ignore -m sphinx -b html -W --keep-going -q docs docs/_build'
    assert make(checkout, 'docs').returncode == 0
    assert len(calls(checkout)) == 1


def test_make_passes_words_on(checkout: Path) -> None:
    assert make(checkout, 'test', 'ARGS=-k sats', 'PIP_ARGS=--no-index').returncode == 0
    done = calls(checkout)
    assert 'install --no-index ' in done[0]
    assert done[-1] == '-m pytest -n 2 --dist loadfile -m not slow -k sats'
    assert make(checkout, 'lint', 'test-slow').returncode == 0
    assert calls(checkout) == ['-m ruff check .', '-m pytest -m slow']


def test_a_failed_install_is_told_and_not_taken_as_whole(checkout: Path) -> None:
    (checkout / 'no-index').touch()
    failed = make(checkout, 'test')
    assert failed.returncode != 0
    assert 'installing failed' in failed.stderr
    assert len(calls(checkout)) == 1
    (checkout / 'no-index').unlink()
    (checkout / '.venv' / 'half-made').touch()
    assert make(checkout, 'test').returncode == 0
    assert not (checkout / '.venv' / 'half-made').exists()
    assert len(calls(checkout)) == 4


def test_an_interrupted_update_is_not_taken_as_whole(checkout: Path) -> None:
    assert make(checkout, 'venv').returncode == 0
    later = (checkout / '.venv' / '.installed').stat().st_mtime + 10
    os.utime(checkout / 'setup.py', (later, later))
    (checkout / 'no-index').touch()
    assert make(checkout, 'venv').returncode != 0
    assert not (checkout / '.venv' / '.installed').exists()


def test_a_python_without_venv_is_named_with_its_cure(checkout: Path) -> None:
    write_script(checkout / 'python', f"""#!/bin/sh
case "$*" in
    *'-m venv'*) mkdir .venv; echo 'ensurepip is not available'; exit 1 ;;
    *ensurepip*) exit 1 ;;
    *) exec '{sys.executable}' "$@" ;;
esac
""")
    failed = make(checkout, 'demo')
    assert failed.returncode != 0
    told = [line for line in failed.stderr.splitlines() if 'Makefile' not in line]
    assert len(told) == 1
    assert 'apt-get install python3-venv' in told[0]
    assert 'ensurepip is not available' not in failed.stdout + failed.stderr
    assert not (checkout / '.venv').exists()


def test_venv_failing_for_another_reason_says_so(checkout: Path) -> None:
    write_script(checkout / 'python', f"""#!/bin/sh
case "$*" in
    *'-m venv'*) echo 'No space left on device'; exit 1 ;;
    *) exec '{sys.executable}' "$@" ;;
esac
""")
    failed = make(checkout, 'venv')
    assert failed.returncode != 0
    assert 'No space left on device' in failed.stderr


def test_an_old_or_absent_python_is_named(checkout: Path) -> None:
    write_script(checkout / 'python', """#!/bin/sh
case "$*" in
    *version_info*) exit 1 ;;
    --version) echo 'Python 3.8.20' ;;
esac
""")
    old = make(checkout, 'test')
    assert old.returncode != 0
    assert "'./python' is Python 3.8.20, expected 3.10 or newer" in old.stderr
    (checkout / 'python').unlink()
    absent = make(checkout, 'test')
    assert absent.returncode != 0
    assert "'./python' does not run" in absent.stderr
    assert not (checkout / '.venv').exists()


def test_a_machine_without_display_libraries_gets_headless_opencv(checkout: Path) -> None:
    (checkout / 'no-display').touch()
    assert make(checkout, 'venv').returncode == 0
    done = calls(checkout)
    assert [call for call in done if 'uninstall -y opencv-python' in call]
    assert done[-2].endswith('opencv-python-headless')
    assert done[-1] == '-c import cv2'
    assert (checkout / '.venv' / '.installed').exists()


def test_make_alone_says_what_there_is(checkout: Path) -> None:
    told = make(checkout).stdout
    for target in ('demo', 'test', 'test-slow', 'lint', 'format', 'docs', 'clean'):
        assert f'make {target} ' in told
    assert not (checkout / '.venv').exists()


def test_make_clean_leaves_environment_and_runs(checkout: Path) -> None:
    for name in ('.venv/lib/__pycache__', 'work_dirs/a', 'mmseg_sats/models/__pycache__', 'build'):
        (checkout / name).mkdir(parents=True)
    assert make(checkout, 'clean').returncode == 0
    left = {name for name in ('.venv/lib/__pycache__', 'work_dirs/a', 'mmseg_sats/models')
            if (checkout / name).exists()}
    assert len(left) == 3
    assert not (checkout / 'mmseg_sats/models/__pycache__').exists()
    assert not (checkout / 'build').exists()


@pytest.mark.parametrize('status', [0, 3])
def test_ci_lints_and_tests_wherever_it_is_called(tmp_path: Path, status: int) -> None:
    write_script(
        tmp_path / 'make', f'#!/bin/sh\necho "$PWD: $*" > {tmp_path}/calls\nexit {status}\n')
    done = subprocess.run(
        [ROOT / '.ci' / 'run'], cwd=tmp_path, capture_output=True, check=False,
        env={**os.environ, 'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'})
    assert done.returncode == status
    assert (tmp_path / 'calls').read_text() == f'{ROOT}: lint test\n'
