# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs of four stages that are killed and resumed, compared with the one that was not.

make test-kill, or python -m tests.kill --moments 30 --method sats

Every run is a process of its own, forked from this one so that it starts at once, and is killed with
SIGKILL: at random moments over the whole run, and right before and right after every write, fsync
and rename. Resumed, it must leave the same results.json and exemplars.json byte for byte and the
same weights bit for bit.
"""

import argparse
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
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mmengine.runner.runner as runner_module
import torch
import torch._dynamo  # the first optimizer imports it, which takes seconds
import yapf.yapflib.yapf_api as yapf_api
from mmengine.config import Config
from mmengine.registry import RUNNERS

import mmseg_sats  # noqa: F401  registers everything
from mmseg_sats.checkpoint import load_checkpoint_safely

CONFIGS = Path(__file__).parents[1] / 'configs'
SMALL = dict(
    image_size=64, crop_size=64, train_images=12, val_images=8, batch_size=4, epochs=2, checkpoint_iters=2
)  # fmt: skip
Event = tuple[str, str, str]  # ('before' or 'after', 'write', 'fsync' or 'rename', file)


@dataclass
class Job:
    """A run: where, with what, and what shall happen to it."""

    work_dir: Path
    data_root: Path
    method: str = 'sats'
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, resume: bool) -> Config:
        cfg = Config.fromfile(CONFIGS / self.method / 'segformer_tiny_shapes_3-1.py')
        cfg.merge_from_dict(SMALL | dict(data_root=str(self.data_root)) | self.options)
        cfg.work_dir, cfg.resume = str(self.work_dir), resume
        # The class index, too, is written by each run.
        for loader in (cfg.train_dataloader, cfg.test_dataloader):
            loader.dataset.cache_dir = str(self.work_dir / 'cache')
        return cfg


class Watch:
    """Calls ``act(number, event)`` around every write, fsync and rename of this process.

    Args:
        act: what to do, e.g. end the process at event 17.
    """

    def __init__(self, act: Callable[[int, Event], None]) -> None:
        self.act, self.count = act, 0
        real_fsync, real_replace, real_open = os.fsync, os.replace, Path.open

        def fsync(descriptor: int) -> None:
            name = os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))
            self.around('fsync', name, lambda: real_fsync(descriptor))

        def replace(source: Path, target: Path) -> None:
            self.around('rename', Path(target).name, lambda: real_replace(source, target))

        def open_(path: Path, mode: str = 'r', *args: Any, **options: Any) -> Any:
            if path.suffix == '.tmp':
                return _WatchedFile(path, self)
            return real_open(path, mode, *args, **options)

        os.fsync, os.replace, Path.open = fsync, replace, open_

    def around(self, what: str, name: str, do: Callable[[], Any]) -> Any:
        self.event(('before', what, name))
        result = do()
        self.event(('after', what, name))
        return result

    def event(self, event: Event) -> None:
        self.act(self.count, event)
        self.count += 1


class _WatchedFile(io.BufferedWriter):
    """A file whose first write is watched: behind it, a file of several writes is cut off."""

    def __init__(self, path: Path, watch: Watch) -> None:
        super().__init__(io.FileIO(path, 'w'))
        self.watch, self.label, self.written = watch, path.name, False

    def write(self, data: Any) -> int:
        if self.written:
            return super().write(data)
        self.written = True

        def really() -> int:
            written = super(_WatchedFile, self).write(data)
            self.flush()
            return written

        return self.watch.around('write', self.label, really)


def prepare() -> None:
    """Does once what every run would do again, so that runs of seconds do not take half a minute."""
    torch.set_num_threads(1)
    for module, name in ((runner_module, 'collect_env'), (runner_module, 'get_git_hash')):
        setattr(module, name, functools.cache(getattr(module, name)))
    runner_module.collect_env()
    runner_module.get_git_hash()
    # Configs stay as they are before their layout is made beautiful.
    yapf_api.FormatCode = lambda text, **_: (text, True)
    gc.freeze()


def start(job: Job, resume: bool, act: Callable[[int, Event], None] | None = None) -> int:
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
                Watch(act)
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
        for pattern in ('results.json', 'results.csv', 'stage_*/exemplars.json')
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


def kill_at_moment(job: Job, seconds: float) -> str:
    """Kills a run after so many seconds; says where it stood."""
    pid = start(job, resume=False)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    done = len(list(job.work_dir.glob('stage_*/done')))
    return f'killed after {seconds:.2f} s, {done} stages done'


def kill_at_event(job: Job, number: int) -> str:
    """Has a run kill itself at an event."""

    def act(count: int, event: Event) -> None:
        if count == number:
            print(f'stopped {event[0]} {event[1]} of {event[2]}', flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    code = wait(start(job, resume=False, act=act))
    if code != -signal.SIGKILL:
        raise RuntimeError(f'event {number} did not come up: exit code {code}: {tail(job)}')
    return tail(job).strip().split('\n')[-1]


def fill_disk_at_event(job: Job, number: int) -> str:
    """Lets the disk be full from an event on; the run must say so and end."""

    def act(count: int, event: Event) -> None:
        if count >= number and event[0] == 'before':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code = wait(start(job, resume=False, act=act))
    said = tail(job)
    if code == 0 or 'No space left on device' not in said:
        raise RuntimeError(f'a full disk at event {number}: exit code {code}: {said}')
    return f'disk full from event {number} on'


def reference(job: Job) -> tuple[list[Event], float]:
    """The run that is left alone: its events and how long it takes."""
    record = job.work_dir.with_name('events.txt')

    def act(_: int, event: Event) -> None:
        with open(record, 'a') as file:
            file.write('\t'.join(event) + '\n')

    before = time.perf_counter()
    code = wait(start(job, resume=False, act=act))
    seconds = time.perf_counter() - before
    if code:
        raise RuntimeError(f'the run itself ended with {code}: {tail(job)}')
    return [tuple(line.split('\t')) for line in record.read_text().splitlines()], seconds


def check(case: tuple[str, Any, Job, Path]) -> tuple[str, list[str]]:
    """Interrupts a run as ``case`` says, resumes it, compares it; cleans up where it is identical."""
    how, where, job, untouched = case
    try:
        name = dict(moment=kill_at_moment, event=kill_at_event, full=fill_disk_at_event)[how](job, where)
        finish(job)
        found = differences(untouched, job.work_dir)
    except RuntimeError as error:
        name, found = f'{how} {where}', [str(error)]
    if not found:
        shutil.rmtree(job.work_dir)
    return name, found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 where all are identical."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, help='folder of the runs (default: a temporary one)')
    parser.add_argument('--method', default='sats', help='folder of configs/')
    parser.add_argument('--memory', type=int, default=0, help='exemplars')
    parser.add_argument('--moments', type=int, default=30, help='random moments')
    parser.add_argument('--events', type=int, help='so many of the events, at random (default: all)')
    parser.add_argument('--full', type=int, help='so many full disks, at random (default: all)')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments')
    args = parser.parse_args(arguments)
    prepare()
    out = args.out or Path(tempfile.mkdtemp(prefix='mmseg_sats_kill_'))
    options = dict(memory=args.memory)

    def job(name: str) -> Job:
        return Job(out / name, out / 'data', args.method, options)

    first = job('first')
    reference(first)  # draws the images, so that the one that counts finds them
    out.joinpath('events.txt').unlink()
    untouched = job('untouched')
    events, seconds = reference(untouched)
    if found := differences(first.work_dir, untouched.work_dir):
        print(f'two runs that nobody stopped differ: {found}')
        return 1
    print(f'the run takes {seconds:.1f} s and has {len(events)} events', flush=True)
    draw = random.Random(args.seed)
    where = [('moment', draw.uniform(0.0, seconds)) for _ in range(args.moments)]
    numbers = list(range(len(events)))
    where += [('event', n) for n in _some(draw, numbers, args.events)]
    before = [n for n in numbers if events[n][:2] == ('before', 'write')]
    where += [('full', n) for n in _some(draw, before, args.full)]
    cases = [(how, at, job(f'{how}_{at}'), untouched.work_dir) for how, at in where]
    identical = 0
    with get_context('fork').Pool(args.jobs) as pool:
        for name, found in pool.imap_unordered(check, cases):
            identical += not found
            print(f'{name}: {found or "identical"}', flush=True)
    if args.out is None and identical == len(cases):
        shutil.rmtree(out)
    print(f'{identical} of {len(cases)} identical')
    return 0 if identical == len(cases) else 1


def _some(draw: random.Random, numbers: list[int], count: int | None) -> list[int]:
    return numbers if count is None else sorted(draw.sample(numbers, min(count, len(numbers))))


if __name__ == '__main__':
    sys.exit(main())
