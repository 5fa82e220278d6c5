# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Scripts in processes of their own, forked from one that has imported what takes seconds to import."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The package, and what a run's first optimizer imports.
PACKAGE = 'import torch._dynamo, mmseg_sats.commands, mmseg_sats.engine'
# A script ends as the interpreter does: with its exit code, by a signal, or with a traceback.
_FORK = """
import gc, json, os, sys
sys.path.remove('')
answers = os.fdopen(os.dup(1), 'w', buffering=1)
os.dup2(2, 1)  # what the preload prints is no answer
{preload}
gc.freeze()  # or each would look for garbage among the libraries' objects when it ends
for line in sys.stdin:
    script, folder, environment, log = json.loads(line)
    child = os.fork()
    if not child:
        answers.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ.update(environment)
        for descriptor, name in ((1, log + '.out'), (2, log + '.err')):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
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


@functools.cache
def _process(preload: str) -> subprocess.Popen:
    """The process that scripts are forked from. It ends with the tests, when its input does."""
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', _FORK.format(preload=preload)], text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT.parent,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
    )  # fmt: skip


def run_forked(
    preload: str, scripts: Sequence[str], folders: Sequence[Path] | None = None, **environment: str
) -> list[Done]:
    """Runs scripts one after the other.

    Args:
        preload: code that the process runs which they are forked from, e.g. its imports. It runs once for all calls.
        scripts: their code. Unlike ``python -c``, they do not find modules in the current folder.
        folders: the current folder of each; the project's if not given.
        environment: variables that are set when a script starts, behind the imports.
    """
    process = _process(preload)
    results = []
    for script, folder in zip(scripts, folders or [ROOT] * len(scripts), strict=True):
        with tempfile.TemporaryDirectory() as logs:
            process.stdin.write(json.dumps([script, str(folder), environment, f'{logs}/log']) + '\n')
            code = process.stdout.readline()
            assert code, f'the process behind {preload!r} ended with {process.wait()}'
            texts = [Path(f'{logs}/log.{kind}').read_text() for kind in ('out', 'err')]
        results.append(Done(int(code), *texts))
    return results
