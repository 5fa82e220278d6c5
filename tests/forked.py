# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Scripts in processes of their own, forked from one that has imported what takes seconds to import."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A script ends as the interpreter does: with its exit code, by a signal, or with a traceback.
_FORK = """
import json, os, sys
sys.path.remove('')
{preload}
calls = json.load(sys.stdin)
for script, folder, log in calls:
    child = os.fork()
    if not child:
        os.chdir(folder)
        for descriptor, name in ((1, log + '.out'), (2, log + '.err')):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
exec(compile(script, '<script>', 'exec'), dict(__name__='__main__'))
"""


@dataclass
class Done:
    """How a script ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(preload: str, scripts: Sequence[str], folders: Sequence[Path] | None = None) -> list[Done]:
    """Runs scripts one after the other.

    Args:
        preload: code that the process runs which they are forked from, e.g. its imports.
        scripts: their code. Unlike ``python -c``, they do not find modules in the current folder.
        folders: the current folder of each; the project's if not given.
    """
    with tempfile.TemporaryDirectory() as logs:
        folders = folders or [ROOT] * len(scripts)
        calls = [(script, str(folder), f'{logs}/{i}')
                 for i, (script, folder) in enumerate(zip(scripts, folders, strict=True))]  # fmt: skip
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', _FORK.format(preload=preload)], input=json.dumps(calls),
            text=True, capture_output=True, check=False, cwd=logs,
            env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        codes = [int(code) for code in done.stdout.split()[-len(calls):]]
        texts = [[Path(f'{log}.{kind}').read_text() for kind in ('out', 'err')] for *_, log in calls]
    return [Done(code, *text) for code, text in zip(codes, texts, strict=True)]
