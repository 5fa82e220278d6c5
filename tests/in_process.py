# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The scripts of tools/ called in the tests' own process, which has imported what takes seconds to import."""

import contextlib
import io
import runpy
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass
class Done:
    """How a script ended and what it printed, as ``subprocess.run`` gives it."""

    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def _as_main(script: str, words: tuple[str, ...], cwd: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *words])
        patch.chdir(cwd)
        yield


def call(script: str, *words: str, cwd: Path = ROOT) -> Done:
    """Does what ``python SCRIPT WORDS`` does in the folder ``cwd``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with _as_main(script, words, cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
        except Exception:
            code = 1
            traceback.print_exc()
    return Done(code, out.getvalue(), err.getvalue())
