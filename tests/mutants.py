# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How many small faults in the package the tests notice.

make test-mutants, or python -m tests.mutants --number 150 --seed 0 --out work_dirs/mutants.json
Two suites on the same mutants: python -m tests.mutants --out new.json --compare old.json

A mutant is the package with one expression changed: a sign, a comparison, a term dropped, two arguments
swapped, `and` for `or`, 0 for 1, a condition negated. Kinds are drawn in turn, places within a kind by the seed.

Which tests a mutant meets: every test file is run once without a mutant, and a trace notes which functions
of the package each test enters, in its fixtures and its own processes, too. A mutant meets the tests that
enter its function; one outside every function meets those that enter any function of its file. They run the
quickest first, until one fails or the next would exceed --budget seconds. A test that fails without a mutant
is left out. What is on file already is neither traced nor run again.

The tests run on a copy of the tree in a temporary folder, in processes forked from this one, which has torch
and mmseg imported, but not the package. Processes that a test starts find the copy by PYTHONPATH.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import Mutant, draw, first_line
from tests.tracing import SITECUSTOMIZE, start_tracing, trace_into

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns('.git', '.venv', 'work_dirs', 'data', '__pycache__', '.*_cache')


class TracePlugin:
    """A pytest plugin: seconds, outcome and functions entered of every test, its fixtures' included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contexts: list[str] = []
        self.tests: dict[str, dict[str, Any]] = {}
        self.names: dict[str, list[str]] = {}

    def _inside(self, context: str) -> Iterator[None]:
        self.contexts.append(context)
        trace_into(str(self.folder / context))
        yield
        self.contexts.pop()
        trace_into(str(self.folder / (self.contexts[-1] if self.contexts else 'other')))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        yield from self._inside(f'fixture{id(fixturedef)}')

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        context = f'test{len(self.names)}'
        fixtures = [f'fixture{id(one)}' for some in item._fixtureinfo.name2fixturedefs.values() for one in some]
        self.names[item.nodeid] = [context, *fixtures]
        yield from self._inside(context)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, dict(seconds=0.0, passed=True))
        test['seconds'] += report.duration
        test['passed'] = test['passed'] and report.passed

    def result(self) -> dict[str, dict[str, Any]]:
        """The tests by their name."""
        def read(context: str) -> set[str]:
            path = self.folder / context
            return set(path.read_text().split()) if path.exists() else set()

        for name, contexts in self.names.items():
            functions = set().union(*(read(context) for context in contexts))
            self.tests[name]['functions'] = sorted(functions)
        return self.tests


class SelectPlugin:
    """A pytest plugin: these tests alone, in this order; notes the first that fails."""

    def __init__(self, names: list[str], note: Path) -> None:
        self.order = {name: index for index, name in enumerate(names)}
        self.note = note

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.note.exists():
            self.note.write_text(report.nodeid)


class Copy:
    """A copy of the tree in a temporary folder, which is deleted at the end."""

    def __init__(self, root: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix='mutants_')
        self.folder = Path(self._folder.name)
        self.tree = self.folder / 'tree'
        shutil.copytree(root, self.tree, ignore=NOT_COPIED)
        if (root / '.venv').exists():
            (self.tree / '.venv').symlink_to((root / '.venv').resolve())
        (self.tree / 'sitecustomize.py').write_text(SITECUSTOMIZE)
        shared = Path(os.environ.get('MMSEG_SATS_SHARED', root.parent / 'shared'))
        os.environ.update(PYTHONPATH=str(self.tree), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1',
                          MMSEG_SATS_SHARED=str(shared))
        sys.dont_write_bytecode = True

    def close(self) -> None:
        self._folder.cleanup()

    def forked(self, task: Callable[[], int], limit: float) -> int | None:
        """What ``task`` returns in a process of its own, None after ``limit`` seconds."""
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            code = 3
            try:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                log = os.open(self.folder / 'log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.chdir(self.tree)
                own = str(ROOT)
                sys.path[:] = [str(self.tree), *(path for path in sys.path if path not in ('', own))]
                for name in [name for name in sys.modules if name.partition('.')[0] in ('tests', 'mmseg_sats')]:
                    del sys.modules[name]
                code = task()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        end, status = time.monotonic() + limit, None
        try:
            while status is None and time.monotonic() < end:
                done, word = os.waitpid(process, os.WNOHANG)
                status = os.waitstatus_to_exitcode(word) if done else time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what the tests have started and left
                os.killpg(process, signal.SIGKILL)
        if status is None:
            os.waitpid(process, 0)
        shutil.rmtree(self.folder / 'pytest', ignore_errors=True)
        return status

    def pytest(self, words: list[str], plugin: Any, limit: float) -> int | None:
        """Runs pytest with ``plugin``."""
        def task() -> int:
            options = ['-q', '-m', 'not slow', '-p', 'no:cacheprovider', '-p', 'no:xdist',
                       '--basetemp', str(self.folder / 'pytest')]
            if isinstance(plugin, TracePlugin):
                trace_into(str(plugin.folder / 'other'))
                start_tracing()
            code = int(pytest.main([*options, *words], plugins=[plugin]))
            sys.settrace(None)
            if isinstance(plugin, TracePlugin):
                write_json(self.folder / 'trace.json', plugin.result())
            return code

        return self.forked(task, limit)

    def trace(self, file: str) -> dict[str, dict[str, Any]]:
        """The tests of one file without a mutant."""
        folder = self.folder / 'functions'
        folder.mkdir()
        (self.folder / 'trace.json').unlink(missing_ok=True)
        code = self.pytest([file], TracePlugin(folder), limit=1800)
        shutil.rmtree(folder)
        if not (self.folder / 'trace.json').exists():
            raise RuntimeError(f'{file} could not be traced ({code}): {(self.folder / "log").read_text()[-2000:]}')
        return json.loads((self.folder / 'trace.json').read_text())

    def run(self, mutant: Mutant, tests: list[str], limit: float) -> dict[str, Any]:
        """The tests on the package with ``mutant`` in it."""
        path, note = self.tree / mutant.file, self.folder / 'note'
        note.unlink(missing_ok=True)
        source = path.read_bytes()
        path.write_bytes(source[: mutant.place[0]] + mutant.new.encode() + source[mutant.place[1] :])
        try:
            files = list(dict.fromkeys(name.partition('::')[0] for name in tests))
            code = self.pytest(['-x', *files], SelectPlugin(tests, note), limit)
        finally:
            path.write_bytes(source)
        by = note.read_text() if note.exists() else {None: 'time', 0: '', 5: ''}.get(code, f'exit {code}')
        return dict(killed=code not in (0, 5), by=by)


def write_json(path: Path, content: Any) -> None:
    """Replaces the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content, indent=0))
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def trace_all(tree: Copy, path: Path) -> dict[str, dict[str, Any]]:
    """Every test's seconds and functions; only files that have changed are traced again."""
    traces = read_json(path)
    files = sorted(f'tests/{file.name}' for file in (tree.tree / 'tests').glob('test_*.py'))
    for index, file in enumerate(files, 1):
        digest = hashlib.sha256((tree.tree / file).read_bytes()).hexdigest()
        if traces.get(file, {}).get('digest') != digest:
            start = time.monotonic()
            tests = tree.trace(file)
            traces[file] = dict(digest=digest, tests=tests)
            write_json(path, traces)
            failed = [name for name, test in tests.items() if not test['passed']]
            print(f'traced {index}/{len(files)} {file}: {len(tests)} tests, {time.monotonic() - start:.0f} s,'
                  f' {len(failed)} skipped or failed', flush=True)
    return {name: test for file in files for name, test in traces[file]['tests'].items() if test['passed']}


def chosen(mutant: Mutant, tests: dict[str, dict[str, Any]], lines: set[int], budget: float) -> list[str]:
    """The tests that ``mutant`` meets, file by file; the quickest where all would exceed ``budget`` seconds."""
    wanted = {f'{mutant.file}:{line}' for line in ([mutant.function] if mutant.function else lines)}
    meeting = [name for name, test in tests.items() if not wanted.isdisjoint(test.get('functions', ()))]
    seconds: dict[str, float] = {}
    files: dict[str, list[str]] = {}
    spent = 0.0
    for name in sorted(meeting, key=lambda name: tests[name]['seconds']):
        spent += tests[name]['seconds']
        if spent > budget:
            break
        file = name.partition('::')[0]
        seconds[file] = seconds.get(file, 0.0) + tests[name]['seconds']
        files.setdefault(file, []).append(name)
    return [name for file in sorted(files, key=seconds.get) for name in tests if name in set(files[file])]


def function_lines(source: str) -> set[int]:
    return {first_line(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def compare(own: dict[str, Any], other: dict[str, Any]) -> None:
    """Prints which mutants one suite kills and the other does not."""
    both = [name for name in own if name in other]
    print(f'{len(both)} mutants in both: {sum(own[n]["killed"] for n in both)} killed here,'
          f' {sum(other[n]["killed"] for n in both)} there')
    for name in both:
        if own[name]['killed'] != other[name]['killed']:
            where = 'here, not there' if own[name]['killed'] else 'there, not here'
            print(f'killed {where}: {name} (by {own[name]["by"] or other[name]["by"]})')


def run_all(out: Path, number: int, seed: int, budget: float) -> dict[str, Any]:
    """Traces what has to be traced and runs the mutants that are not on file."""
    import mmengine.runner  # noqa: F401  what takes seconds to import
    import mmseg.apis  # noqa: F401
    import torch._dynamo  # noqa: F401

    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped by SIGTERM'))
    tree = Copy(ROOT)
    try:
        tests = trace_all(tree, out.with_suffix('.traces.json'))
        results = read_json(out)
        mutants = draw(tree.tree, number, seed)
        for index, mutant in enumerate(mutants, 1):
            if str(mutant) in results:
                continue
            lines = function_lines((tree.tree / mutant.file).read_text())
            names = chosen(mutant, tests, lines, budget)
            start = time.monotonic()
            limit = 30 + 4 * sum(tests[name]['seconds'] for name in names)
            result = tree.run(mutant, names, limit) if names else dict(killed=False, by='')
            results[str(mutant)] = dict(result, tests=len(names), seconds=round(time.monotonic() - start, 1))
            write_json(out, results)
            word = f'killed by {result["by"]}' if result['killed'] else 'SURVIVED'
            seconds = time.monotonic() - start
            print(f'{index}/{number} {mutant}: {word} ({len(names)} tests, {seconds:.0f} s)', flush=True)
    finally:
        tree.close()
    drawn = {str(mutant): results[str(mutant)] for mutant in mutants}
    print(f'{sum(result["killed"] for result in drawn.values())} of {len(drawn)} mutants killed')
    return drawn


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--number', type=int, default=150, help='mutants (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='which mutants (default: %(default)s)')
    parser.add_argument('--budget', type=float, default=90, help='seconds of tests a mutant meets, %(default)s')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/mutants.json'), help='results, %(default)s')
    parser.add_argument('--compare', type=Path, help="another suite's results, to be compared with")
    args = parser.parse_args()
    drawn = run_all(args.out, args.number, args.seed, args.budget)
    if args.compare:
        compare(drawn, read_json(args.compare))


if __name__ == '__main__':
    main()
