# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""`import mmseg_sats` is quick, and yet all that registries need, in whatever order things are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import mmseg_sats
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


def python(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-c', f'import sys\n{text}'], cwd=ROOT, text=True, capture_output=True,
                          check=False)


def test_public_names_are_reached_from_the_package_alone() -> None:
    """As attributes, without an import of their module."""
    text = f"""
import functools, mmseg_sats
for name in {IMPORTABLE}:
    functools.reduce(getattr, name.split('.')[1:], mmseg_sats)
"""
    done = python(text)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('order', ORDERS)
def test_parts_are_known_in_any_order_of_imports(order: str) -> None:
    """And where mmseg comes later than mmseg_sats, it does not say what needs no action."""
    done = python(ORDERS[order])
    assert done.returncode == 0, done.stderr[-3000:]
    if order != 'last':
        assert 'OneDL' not in done.stdout
        assert 'Fail to import' not in done.stderr


def test_without_mmseg_what_needs_none_works() -> None:
    done = python(ABSENT.format(names=HEAVY) + CHEAP)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('text', ['mmseg_sats.models', 'from mmseg_sats.engine import IncrementalRunner'])
def test_without_mmseg_the_rest_says_what_to_install(text: str) -> None:
    done = python(f'{ABSENT.format(names=["mmseg"])}\nimport mmseg_sats\n{text}')
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: mmseg is not installed: `pip install 'mmseg_sats[mm]'` brings")
    assert 'During handling' not in done.stderr


def test_mmengine_alone_goes_on() -> None:
    text = """
import importlib.util, mmseg_sats
looked = importlib.util.find_spec
importlib.util.find_spec = mmseg_sats.find_spec = lambda name, *rest: None if name == 'mmseg' else looked(name, *rest)
from mmengine.hooks import IterTimerHook
from mmengine.registry import HOOKS
assert HOOKS.get('IterTimerHook') is IterTimerHook
assert 'mmseg' not in sys.modules
"""
    done = python(text)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_fails_while_parts_are_imported_is_said_every_time() -> None:
    text = """
import mmseg_sats
mmseg_sats._REGISTERING = ('absent_part',)
from mmengine.registry import HOOKS
for _ in range(2):
    try:
        HOOKS.get('FiniteHook')
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert python(text).stdout.split() == ['mmseg_sats.absent_part'] * 2


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'mmseg_sats' has no attribute 'modles'"):
        mmseg_sats.modles  # noqa: B018
