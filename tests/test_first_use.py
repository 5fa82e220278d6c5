# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""`import mmseg_sats` is quick, and yet all that registries need, in whatever order things are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import mmseg_sats
from tests.forked import Done, run_forked
from tests.test_compatibility import IMPORTABLE

ROOT = Path(__file__).parents[1]
HEAVY = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmseg')
CHEAP = f"""
import sys
import mmseg_sats
assert mmseg_sats.protocol.Protocol is mmseg_sats.Protocol and 'models' in dir(mmseg_sats)
assert not [name for name in {HEAVY} if name in sys.modules]
"""
BUILT = """
assert MODELS.build(dict(type='CRPDistillationLoss'))
assert 'mmseg_sats' in mmengine.config.utils.MODULE2PACKAGE
"""
ORDERS = dict(
    first=f"""
{CHEAP}
from importlib.util import find_spec
assert find_spec('mmseg').loader.get_filename() == find_spec('mmseg').origin  # a look changes nothing
from mmseg.registry import MODELS
import mmengine, mmseg
{BUILT}
assert mmseg.__loader__ is mmseg.__spec__.loader is not None
assert 'mmseg_sats' not in type(mmseg.__loader__).__module__
""",
    before_mmseg=f"""
import sys
import mmengine
import mmseg_sats
assert not [name for name in sys.modules if name.startswith('mmseg_sats.models')]
from mmengine.registry import HOOKS, RUNNERS
assert RUNNERS.get('IncrementalRunner') and 'FiniteHook' in HOOKS
from mmseg.registry import MODELS
{BUILT}
""",
    last="""
import mmseg.registry
from mmengine.registry import RUNNERS
import mmseg_sats
assert RUNNERS.get('StageRunner')
""",
)
# A library that is not there, for whoever imports it and for whoever only looks.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name in {names}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
"""


# Scripts in processes that have imported torch and mmengine, and nothing of mmseg or of this package.
BEHIND_MMENGINE = dict(
    # Public names are reached as attributes, without an import of their module.
    names=f"""
import functools, mmseg_sats
for name in {IMPORTABLE}:
    functools.reduce(getattr, name.split('.')[1:], mmseg_sats)
""",
    before_mmseg=ORDERS['before_mmseg'],
    last=ORDERS['last'],
    mmengine_alone="""
import importlib.util, sys, mmseg_sats
looked = importlib.util.find_spec
importlib.util.find_spec = mmseg_sats.find_spec = lambda name, *rest: None if name == 'mmseg' else looked(name, *rest)
from mmengine.hooks import IterTimerHook
from mmengine.registry import HOOKS
assert HOOKS.get('IterTimerHook') is IterTimerHook
assert 'mmseg' not in sys.modules
""",
    # What fails while parts are imported is said every time.
    failing="""
import mmseg_sats
mmseg_sats._REGISTERING = ('absent_part',)
from mmengine.registry import HOOKS
for _ in range(2):
    try:
        HOOKS.get('FiniteHook')
    except ModuleNotFoundError as error:
        print(error.name)
""",
    **{
        f'without_mmseg_{kind}': f'{ABSENT.format(names=["mmseg"])}\nimport mmseg_sats\n{text}'
        for kind, text in dict(
            attribute='mmseg_sats.models', module='from mmseg_sats.engine import IncrementalRunner'
        ).items()
    },
)


def python(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-c', f'import sys\n{text}'], cwd=ROOT, text=True, capture_output=True,
                          check=False)


@pytest.fixture(scope='module')
def behind_mmengine() -> dict[str, Done]:
    done = run_forked('import torch, mmengine.runner', list(BEHIND_MMENGINE.values()))
    return dict(zip(BEHIND_MMENGINE, done, strict=True))


@pytest.mark.parametrize('script', ['names', 'before_mmseg', 'last', 'mmengine_alone', 'failing'])
def test_parts_are_known_in_any_order_of_imports(script: str, behind_mmengine: dict[str, Done]) -> None:
    """And where mmseg comes later than mmseg_sats, it does not say what needs no action."""
    done = behind_mmengine[script]
    assert done.returncode == 0, done.stderr[-3000:]
    if script != 'last':
        assert 'OneDL' not in done.stdout
        assert 'Fail to import' not in done.stderr
    if script == 'failing':
        assert done.stdout.split() == ['mmseg_sats.absent_part'] * 2


def test_parts_are_known_where_mmseg_sats_is_imported_first() -> None:
    done = python(ORDERS['first'])
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'OneDL' not in done.stdout
    assert 'Fail to import' not in done.stderr


def test_without_mmseg_what_needs_none_works() -> None:
    done = python(ABSENT.format(names=HEAVY) + CHEAP)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('kind', ['attribute', 'module'])
def test_without_mmseg_the_rest_says_what_to_install(kind: str, behind_mmengine: dict[str, Done]) -> None:
    done = behind_mmengine[f'without_mmseg_{kind}']
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: mmseg is not installed: `pip install 'mmseg_sats[mm]'` brings")
    assert 'During handling' not in done.stderr


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'mmseg_sats' has no attribute 'modles'"):
        mmseg_sats.modles  # noqa: B018
