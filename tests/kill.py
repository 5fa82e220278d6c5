# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs of four stages that are killed and resumed, compared with the one that was not.

make test-kill, or python -m tests.kill --moments 30 --method sats; with --iters 5 by iteration

Runs are killed with SIGKILL: at random moments over the whole run, and right before and right after
every write, fsync and rename. A full disk meets every write, too. Resumed, a run must leave the same
results.json and exemplars.json byte for byte and the same weights bit for bit.

What makes that feasible: processes are forked from this one, which has everything imported; and a run
is killed several times, each time a fifth of the run after it was resumed the last time, so that about
five events share one comparison. Where that run differs, each of its events is tried again alone.
"""

import argparse
import copy
import errno
import functools
import gc
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mmengine.hooks.runtime_info_hook as runtime_info_hook
import mmengine.runner.runner as runner_module
import torch
import torch._dynamo  # the first optimizer imports it, which takes seconds
from mmengine.config import Config
from mmengine.registry import RUNNERS

import mmseg_sats
import mmseg_sats.visualization.report.page  # noqa: F401  with matplotlib, which takes seconds too
from mmseg_sats.engine.config import config_text
from mmseg_sats.engine.training.stage_runner import collect_environment
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

CONFIGS = Path(__file__).parents[1] / 'configs'
SMALL = dict(
    image_size=64, crop_size=64, train_images=12, val_images=8, batch_size=4, epochs=2, checkpoint_iters=2,
    report=dict(images=1, attention=0),
)  # fmt: skip
# Full batches without end, and the best of every other iteration on held-out images.
BY_ITERATION = {
    'protocol': '3-3', 'train_images': 18, 'train_dataloader.sampler.type': 'InfiniteSampler', 'held_out': 0.34,
    'train_cfg.max_iters': '$iters', 'train_cfg.val_interval': 2,
}  # fmt: skip
BARE = dict(protocol='3-3', rehearsal=None, report=None)
COMPARED = (
    'results.json', 'results.csv', 'stage_*/exemplars.json', 'stage_*/pseudo_label_thresholds.json',
    'stage_*/held_out.json', 'stage_*/*.npz',
)  # fmt: skip
Event = tuple[str, str, str]  # ('before' or 'after', 'write', 'fsync', ... , which file)
SHARE = 5  # a chain's kills lie at least so much of a run apart


@dataclass(frozen=True)
class Stop:
    """One thing that happens to a run.

    Args:
        how: 'event' (killed at it), 'full' (a full disk from it on) or 'moment' (killed then).
        at: the event, or seconds.
        place: number of the event.
    """

    how: str
    at: Any
    place: int = 0

    def __str__(self) -> str:
        if self.how == 'moment':
            return f'killed after {self.at:.2f} s'
        return f'{"killed" if self.how == "event" else "disk full"} {" ".join(self.at)}'


@dataclass
class Job:
    """A run: where, with what, and what shall happen to it."""

    work_dir: Path
    data_root: Path
    method: str = 'sats'
    options: dict[str, Any] = field(default_factory=dict)

    def beside(self, name: str) -> 'Job':
        """The same run in another folder."""
        return replace(self, work_dir=self.work_dir.with_name(name))

    def config(self, resume: bool) -> Config:
        cfg = copy.deepcopy(recipe(self.method))
        cfg.merge_from_dict(SMALL | dict(data_root=str(self.data_root)) | self.options)
        cfg.work_dir, cfg.resume = str(self.work_dir), resume
        # The class index, too, is written by each run.
        for loader in (cfg.train_dataloader, cfg.test_dataloader):
            loader.dataset.cache_dir = str(self.work_dir / 'cache')
        return cfg


@functools.cache
def recipe(method: str) -> Config:
    """The config of a method on the embedded data, read once."""
    return Config.fromfile(CONFIGS / method / 'segformer_tiny_shapes_3-1.py')


class Watch:
    """Calls ``act(event)`` around every write, fsync and rename of this process.

    A file's name in an event says behind which others it is written, so that an event is the same
    one in a resumed run.

    Args:
        root: the run's work dir.
        act: what to do, e.g. end the process at a certain event.
    """

    def __init__(self, root: Path, act: Callable[[Event], None]) -> None:
        self.root, self.act, self.files = root, act, ('',) * 5
        real_fsync, real_replace, real_open = os.fsync, os.replace, Path.open

        def fsync(descriptor: int) -> None:
            folder = os.path.isdir(f'/proc/self/fd/{descriptor}')
            self.around('fsync of the folder' if folder else 'fsync', lambda: real_fsync(descriptor))

        def rename(source: Path, target: Path) -> None:
            self.around('rename', lambda: real_replace(source, target))

        def open_(path: Path, mode: str = 'r', *args: Any, **options: Any) -> Any:
            if path.suffix == '.tmp':
                name = path.name.removeprefix('.').rsplit('.', 2)[0]  # .NAME.PROCESS.tmp
                file = os.path.relpath(path.with_name(name), self.root)
                self.files = (file, *self.files[:-1])
                return _WatchedFile(path, self)
            return real_open(path, mode, *args, **options)

        os.fsync, os.replace, Path.open = fsync, rename, open_

    def around(self, what: str, do: Callable[[], Any]) -> Any:
        name = f'{self.files[0]} behind {", ".join(self.files[1:])}'
        self.act(('before', what, name))
        result = do()
        self.act(('after', what, name))
        return result


class _WatchedFile(io.BufferedWriter):
    """A file whose first write is watched: behind it, a file of several writes is cut off."""

    def __init__(self, path: Path, watch: Watch) -> None:
        super().__init__(io.FileIO(path, 'w'))
        self.watch, self.written = watch, False

    def write(self, data: Any) -> int:
        if self.written:
            return super().write(data)
        self.written = True

        def really() -> int:
            written = super(_WatchedFile, self).write(data)
            self.flush()
            return written

        return self.watch.around('write', really)


def prepare() -> None:
    """Does once what every run would do again, so that runs of seconds do not take half a minute."""
    torch.set_num_threads(1)
    collect_environment()
    for module in (runner_module, runtime_info_hook):
        module.get_git_hash = functools.cache(module.get_git_hash)
        module.get_git_hash()
    config_text.FormatCode = lambda text, **_: (f'{text}\n', True)
    gc.freeze()


def start(job: Job, resume: bool, act: Callable[[Event], None] | None = None) -> int:
    """Forks a process that does the run; returns its id."""
    job.work_dir.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with (job.work_dir / 'log.txt').open('a') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            if act is not None:
                Watch(job.work_dir, act)
            RUNNERS.build(job.config(resume)).train()
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(job: Job) -> None:
    """Resumes a run to its end."""
    code = wait(start(job, resume=True))
    if code:
        raise RuntimeError(f'resuming ended with {code}: {tail(job)}')


def tail(job: Job) -> str:
    """The end of what a run printed."""
    return '\n'.join((job.work_dir / 'log.txt').read_text().split('\n')[-12:])


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the results, exemplars and weights of two finished runs."""
    names = {
        str(path.relative_to(root))
        for root in (one, other)
        for pattern in COMPARED
        for path in root.glob(pattern)
    }
    found = [
        name for name in sorted(names)
        if not all((root / name).is_file() for root in (one, other))
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]  # fmt: skip
    for path in sorted(one.glob('stage_*/snapshot.pth')):
        name = str(path.relative_to(one))
        mine, theirs = (load_checkpoint_safely(root / name)['state_dict'] for root in (one, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[k], theirs[k]) for k in mine):
            found.append(name)
    return found


def kill_at_moment(job: Job, resume: bool, seconds: float) -> None:
    """Kills a run after so many seconds."""
    pid = start(job, resume)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    wait(pid)


def kill_at_event(job: Job, resume: bool, wanted: Event) -> None:
    """Has a run kill itself at an event."""

    def act(event: Event) -> None:
        if event == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    code = wait(start(job, resume, act))
    if code != -signal.SIGKILL:
        raise RuntimeError(f'{wanted} did not come up: exit code {code}: {tail(job)}')


def fill_disk_at_event(job: Job, resume: bool, wanted: Event) -> None:
    """Lets the disk be full from an event on; the run must say so and, unless all is done, end."""
    full = False

    def act(event: Event) -> None:
        nonlocal full
        full = full or event == wanted
        if full and event[0] == 'before':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code = wait(start(job, resume, act))
    said = tail(job)
    # A report that cannot be written is a warning.
    good = code == 0 if wanted[2].startswith('report') else code > 0
    if not good or os.strerror(errno.ENOSPC) not in said:
        raise RuntimeError(f'a full disk {wanted}: exit code {code}: {said}')


STOPS = dict(moment=kill_at_moment, event=kill_at_event, full=fill_disk_at_event)


def reference(job: Job) -> tuple[list[Event], float]:
    """The run that is left alone: its events and how long it takes."""
    record = job.work_dir.with_name(f'{job.work_dir.name}_events.txt')

    def act(event: Event) -> None:
        with open(record, 'a') as file:
            file.write('\t'.join(event) + '\n')

    before = time.perf_counter()
    code = wait(start(job, resume=False, act=act))
    seconds = time.perf_counter() - before
    if code:
        raise RuntimeError(f'the run itself ended with {code}: {tail(job)}')
    events = [tuple(line.split('\t')) for line in record.read_text().splitlines()]
    if len(set(events)) < len(events):
        raise RuntimeError(f'{record}: two events cannot be told from each other')
    return events, seconds


def chains(stops: Sequence[Stop], apart: int) -> list[list[Stop]]:
    """Stops that one run can meet one after the other, at least so many events apart."""
    result: list[list[Stop]] = []
    for stop in stops:
        fitting = (chain for chain in result if chain[-1].place + apart <= stop.place)
        chain = next(fitting, None)
        if chain is None:
            result.append([stop])
        else:
            chain.append(stop)
    return result


def check(case: tuple[Sequence[Stop], Job, Path]) -> list[tuple[str, str]]:
    """Stops a run as ``case`` says, resuming it after each, and compares its end.

    Returns:
        Of every stop, what it was and what went wrong ('': nothing).
    """
    stops, job, untouched = case
    try:
        for number, stop in enumerate(stops):
            STOPS[stop.how](job, number > 0, stop.at)
        finish(job)
        wrong = ', '.join(differences(untouched, job.work_dir))
    except RuntimeError as error:
        wrong = str(error)
    if not wrong:
        shutil.rmtree(job.work_dir)
    elif len(stops) > 1:
        alone = [
            found
            for number, stop in enumerate(stops)
            for found in check(([stop], job.beside(f'{job.work_dir.name}_{number}'), untouched))
        ]
        if any(found for _, found in alone):
            return alone
        wrong = f'each alone is identical, one after the other they are not: {wrong}'
    return [(str(stop), wrong) for stop in stops]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 where all are identical."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, help='folder of the runs (default: a temporary one)')
    parser.add_argument('--method', default='sats', help='folder of configs/')
    parser.add_argument('--memory', type=int, default=6, help='exemplars')
    parser.add_argument('--iters', type=int, help='iterations a stage, validated within, in place of two epochs')
    parser.add_argument('--bare', action='store_true', help='two stages, no rehearsal, no report: less time')
    parser.add_argument('--moments', type=int, default=30, help='random moments')
    parser.add_argument('--events', type=int, help='so many of the events, at random (default: all)')
    parser.add_argument('--full', type=int, help='so many full disks, at random (default: all)')
    parser.add_argument('--apart', type=int, help='events between two kills of a run (default: a fifth)')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments')
    args = parser.parse_args(arguments)
    out = args.out or Path(tempfile.mkdtemp(prefix='mmseg_sats_kill_'))
    options = dict(memory=args.memory) | (BARE if args.bare else {})
    if args.iters:
        options |= BY_ITERATION | dict(iters=args.iters)
    first = Job(out / 'first', out / 'data', args.method, options)
    prepare()
    reference(first)  # draws the images, so that the one that counts finds them
    untouched = first.beside('untouched')
    events, seconds = reference(untouched)
    if found := differences(first.work_dir, untouched.work_dir):
        print(f'two runs that nobody stopped differ: {found}')
        return 1
    print(f'the run takes {seconds:.1f} s and has {len(events)} events', flush=True)
    draw = random.Random(args.seed)
    apart = args.apart or len(events) // SHARE
    stops = [[Stop('moment', draw.uniform(0.0, seconds))] for _ in range(args.moments)]
    for how, count, whats in (('event', args.events, None), ('full', args.full, ('before', 'write'))):
        all_ = [Stop(how, e, n) for n, e in enumerate(events) if whats in (None, e[:2])]
        stops += chains(_some(draw, all_, count), apart)
    cases = [(c, first.beside(f'stopped_{n}'), untouched.work_dir) for n, c in enumerate(stops)]
    identical = total = 0
    with get_context('fork').Pool(args.jobs) as pool:
        for results in pool.imap_unordered(check, cases):
            for name, wrong in results:
                total, identical = total + 1, identical + (not wrong)
                print(f'{name}: {wrong or "identical"}', flush=True)
    if args.out is None and identical == total:
        shutil.rmtree(out)
    print(f'{identical} of {total} identical')
    return 0 if identical == total else 1


def _some(draw: random.Random, stops: list[Stop], count: int | None) -> list[Stop]:
    if count is None:
        return stops
    return sorted(draw.sample(stops, min(count, len(stops))), key=lambda stop: stop.place)


if __name__ == '__main__':
    sys.exit(main())
