# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The wheel, the requirements and the Makefile; no test here needs the network, or installs anything for good."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from mmseg_sats.version import __version__

ROOT = Path(__file__).parents[1]
IMPORT_NAMES = {'opencv-python': 'cv2', 'pillow': 'PIL', 'pyyaml': 'yaml'}
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


# What a build reads. In .mim are links, which stay links.
SOURCES = (
    'mmseg_sats', 'configs', 'tools', 'model-index.yml', 'requirements', 'requirements.txt',
    'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE',
)  # fmt: skip
BUILD = """
from setuptools import build_meta
print([getattr(build_meta, f'build_{kind}')('built') for kind in %r])
"""


def build(folder: Path, *kinds: str) -> Path:
    """What pip asks of setuptools for a source tree; returns the folder of the results."""
    (folder / 'built').mkdir()
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', BUILD % (kinds,)], cwd=folder, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'would be ignored' not in done.stderr
    return folder / 'built'


@pytest.fixture(scope='module')
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of this tree."""
    folder = tmp_path_factory.mktemp('tree')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder)
    for place in ('configs/sats', 'tools', 'mmseg_sats/engine'):
        (folder / place / '__pycache__').mkdir(exist_ok=True)
        (folder / place / '__pycache__/left_over.pyc').touch()
    return build(folder, 'sdist', 'wheel')


@pytest.fixture(scope='module')
def wheel(archives: Path) -> zipfile.ZipFile:
    (path,) = archives.glob('*.whl')
    return zipfile.ZipFile(path)


def test_an_editable_install_is_found_beside_a_clone_of_that_name(archives: Path, tmp_path: Path) -> None:
    clone = tmp_path / 'mmseg_sats'
    shutil.copytree(archives.parent, clone, symlinks=True, ignore=shutil.ignore_patterns('built', 'build'))
    (editable,) = build(clone, 'editable').glob('*.whl')
    with zipfile.ZipFile(editable) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith('.pth'))
        (place,) = opened.read(name).decode().splitlines()
    assert Path(place).resolve() == clone.resolve()
    # A .pth file adds its folder to sys.path; a package there goes before a folder of its name without code.
    code = f'import sys; sys.path.append({place!r}); import mmseg_sats; print(mmseg_sats.__file__)'
    done = subprocess.run([sys.executable, '-ES', '-c', code], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == str(clone / 'mmseg_sats/__init__.py'), done.stderr[-2000:]


@pytest.fixture(scope='module')
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
    return message_from_string(wheel.read(name).decode())


def requirements_of(metadata: Message, extra: str | None) -> list[str]:
    """The requirements of the package itself, or of one extra."""
    lines = [line.partition('; extra == ') for line in metadata.get_all('Requires-Dist')]
    return [name for name, _, given in lines if given.strip('"') == (extra or '')]


def test_the_package_depends_on_no_distribution_of_mm(metadata: Message) -> None:
    assert requirements_of(metadata, None)
    assert not [name for name in requirements_of(metadata, None) if is_mm(name)]
    assert len([name for name in requirements_of(metadata, 'mm') if is_mm(name)]) == 3
    assert not [name for name in distributions('runtime') if is_mm(name)]


def test_pip_replaces_nothing_that_is_installed(metadata: Message) -> None:
    """`make test-stacks` asks pip itself, beside every stack; this is what the answer rests on."""
    asked = requirements_of(metadata, None)
    assert asked == distributions('runtime'), 'a bound replaces what is installed and lies outside it'
    # These come in several builds or, where they are new, bring another numpy.
    assert not {'torch', 'opencv-python', 'matplotlib', 'scipy'} & set(asked)
    assert requirements_of(metadata, 'mm') == distributions('mm')


def test_every_file_of_requirements_is_an_extra(metadata: Message) -> None:
    files = {path.stem for path in (ROOT / 'requirements').glob('*.txt')}
    assert set(metadata.get_all('Provides-Extra')) == files - {'runtime', 'constraints'}
    for extra in files - {'runtime', 'constraints'}:
        assert [re.match(r'[\w.-]+', line)[0] for line in requirements_of(metadata, extra)] == distributions(extra)


def test_the_page_of_the_wheel_says_what_it_is(metadata: Message) -> None:
    assert metadata['Version'] == __version__
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.10'
    assert metadata.get_payload().strip() == (ROOT / 'README.md').read_text(encoding='utf-8').strip()
    assert 'Typing :: Typed' in metadata.get_all('Classifier')


def files_of(folder: Path, below: str) -> set[str]:
    """The files of a folder of this tree, under another name."""
    paths = (path for path in folder.rglob('*') if path.is_file() and path.suffix != '.pyc')
    return {f'{below}/{path.relative_to(folder).as_posix()}' for path in paths if '.mim' not in path.parts}


def test_the_wheel_holds_package_configs_tools_and_model_index(wheel: zipfile.ZipFile) -> None:
    installed = {name for name in wheel.namelist() if '.dist-info/' not in name}
    assert installed == {
        'mmseg_sats/.mim/model-index.yml',
        *files_of(ROOT / 'mmseg_sats', 'mmseg_sats'),
        *files_of(ROOT / 'configs', 'mmseg_sats/.mim/configs'),
        *files_of(ROOT / 'tools', 'mmseg_sats/.mim/tools'),
    }
    assert {
        'mmseg_sats/py.typed',
        'mmseg_sats/functional/features/crp_loss.py',
        'mmseg_sats/datasets/checks/published_counts.csv',
        'mmseg_sats/engine/experiments/published.csv',
        'mmseg_sats/engine/experiments/published_newer.csv',
        'mmseg_sats/visualization/report/templates/report.html.j2',
        'mmseg_sats/.mim/configs/sats/metafile.yml',
    } <= installed
    shell = wheel.getinfo('mmseg_sats/.mim/tools/dist_train.sh')
    assert wheel.read(shell) == (ROOT / 'tools/dist_train.sh').read_bytes()


def test_the_sdist_builds_the_same_wheel(
    archives: Path, wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    (path,) = archives.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    (other,) = build(folder, 'wheel').glob('*.whl')
    again = zipfile.ZipFile(other)
    assert sorted(again.namelist()) == sorted(wheel.namelist())
    for name in wheel.namelist():
        if not name.endswith('RECORD'):  # in another order
            assert again.read(name) == wheel.read(name), name


def test_in_a_checkout_mim_is_links_to_what_it_stands_for() -> None:
    for name in ('configs', 'tools', 'model-index.yml'):
        path = ROOT / 'mmseg_sats/.mim' / name
        assert path.is_symlink()
        assert path.resolve() == ROOT / name


@pytest.fixture(scope='module')
def site(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp('site')
    words = ['install', '--quiet', '--no-deps', '--no-index', '--no-compile', '--target', str(folder)]
    done = subprocess.run([sys.executable, '-m', 'pip', *words, *map(str, archives.glob('*.whl'))], text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def in_empty_folder(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where there is nothing, with what was installed and without this checkout."""
    env = {**os.environ, 'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-W', 'ignore', *words], cwd=folder, env=env, text=True,
                          capture_output=True, check=False)


def test_the_command_is_installed_and_finds_its_configs(site: Path, tmp_path: Path) -> None:
    done = in_empty_folder(site, tmp_path, str(site / 'bin/mmseg-sats'), '--version')
    assert done.stdout == f'mmseg-sats {__version__}\n', done.stderr
    find = "from mmseg_sats.utils.installed import find_config; print(find_config('sats/segformer_b2_voc_15-1'))"
    found = in_empty_folder(site, tmp_path, '-c', find).stdout.strip()
    assert found == str(site / 'mmseg_sats/.mim/configs/sats/segformer_b2_voc_15-1.py')


def test_the_installed_package_trains_a_config_that_inherits_from_its_own(
    site: Path, tmp_path: Path, shapes_root: Path
) -> None:
    """From a user's folder, in which there is nothing of ours."""
    (tmp_path / 'own.py').write_text("_base_ = 'mmseg_sats::sats/segformer_tiny_shapes_3-1.py'\n")
    options = [
        f'data_root={shapes_root}', 'protocol=3-3', 'epochs=1', 'image_size=64', 'crop_size=64', 'batch_size=4',
        'train_images=24', 'val_images=12', 'train_dataloader.num_batch_per_epoch=1',
        'test_dataloader.num_batch_per_epoch=2', 'report=None',
    ]  # fmt: skip
    words = ['train', 'own.py', '--work-dir', 'run', '--cfg-options', *options]
    done = in_empty_folder(site, tmp_path, '-m', 'mmseg_sats', *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert sorted(path.parent.name for path in tmp_path.glob('run/*/done')) == ['stage_0', 'stage_1']
    assert '_scope_' not in (tmp_path / 'run/stage_1/config.py').read_text()


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / 'requirements' / 'constraints.txt').read_text().splitlines()
    pins = [re.match(r'([\w.-]+)==[\w.]+(; python_version >= "3\.\d+")?$', line)
            for line in lines if not line.startswith('#')]
    assert all(pins), 'a constraint is not NAME==VERSION'
    pinned = {pin[1].lower() for pin in pins}
    for name in ('runtime', 'mm', 'tests', 'dev', 'onnx', 'voc', 'docs', 'tracking'):
        assert {distribution.lower() for distribution in distributions(name)} <= pinned


def test_every_import_is_required() -> None:
    known = {IMPORT_NAMES.get(name, name) for name in distributions('runtime') + distributions('mm')}
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
    for name in ('Makefile', 'pyproject.toml', 'requirements.txt'):
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
    assert done[-1] == '-m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow -k sats'
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
    os.utime(checkout / 'pyproject.toml', (later, later))
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
