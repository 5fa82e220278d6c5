# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Trains the runs of a table, some at a time, each in a process of its own."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.status import Status

from mmseg_sats.engine.experiments.compare import same_start
from mmseg_sats.engine.experiments.record import Record
from mmseg_sats.engine.files.lock import FileLock

TAIL = 12
STOP_SECONDS = 60


@dataclass
class Job:
    """A run that is being trained."""

    record: Record
    process: subprocess.Popen
    locks: list[FileLock]
    log_start: int
    started: float
    stages_done: int

    @property
    def name(self) -> str:
        """The run's name."""
        return self.record.run.name


class Scheduler:
    """Trains the missing runs; one that fails is reported with the last lines of its log, the others continue.

    A run is locked while it is trained, and so is a stage 0 that other runs need, so several schedulers
    may work on one work dir.

    Args:
        records: the runs, the most wanted first.
        script: ``tools/train_incremental.py``.
        console: where progress is shown; a terminal gets one line that is updated, a log plain lines.
        jobs: runs at a time.
        threads: threads of each; by default the cores over the jobs.
        poll: seconds between two looks at the processes.
    """

    def __init__(
        self,
        records: Sequence[Record],
        script: Path,
        console: Console,
        *,
        jobs: int = 1,
        threads: int | None = None,
        poll: float = 2.0,
    ) -> None:
        self.waiting = list(records)
        self.script = script
        self.console = console
        self.jobs = jobs
        self.threads = threads or max(1, (os.cpu_count() or 1) // jobs)
        self.poll = poll
        self.running: list[Job] = []
        self.failed: list[str] = []
        self._elsewhere: dict[str, str] = {}
        self._said: set[str] = set()

    def run(self) -> list[str]:
        """Trains until nothing is left.

        Returns:
            Names of the runs that failed.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when the children have been stopped.
        """
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        live = self.console.status('') if self.console.is_terminal else contextlib.nullcontext()
        try:
            with live as status:
                while self.waiting or self.running:
                    self._reap()
                    self._start_ready()
                    self._show(status)
                    if self.waiting or self.running:
                        time.sleep(self.poll)
        except KeyboardInterrupt:
            self._say('stopping; a second Ctrl-C does not wait for the present checkpoints')
            raise
        finally:
            self._stop()
            signal.signal(signal.SIGTERM, previous)
        return self.failed

    def _start_ready(self) -> None:
        self._elsewhere = {}
        for record in list(self.waiting):
            if len(self.running) >= self.jobs:
                return
            self._try_to_start(record)

    def _try_to_start(self, record: Record) -> None:
        """Starts a run unless somebody else trains it, or the stage 0 that it needs."""
        lock = FileLock(record.folder / 'run.lock')
        if not lock.acquire():
            self._elsewhere[record.run.name] = lock.holder()
            return
        conflict = record.conflict()
        if conflict or record.results() is not None:
            self.waiting.remove(record)
            lock.release()
            self._say(f'{record.run.name}: {conflict or "finished by another process"}')
            return
        locks = [lock]
        own_start = (record.folder / 'stage_0/done').exists()
        base = record.base() if own_start else record.find_start()
        if base is None and not own_start:
            start_lock = self._lock_start(record)
            if start_lock is None:
                lock.release()
                return
            locks.append(start_lock)
        self.waiting.remove(record)
        self._spawn(record, base if base and base.exists() else None, locks)

    def _lock_start(self, record: Record) -> FileLock | None:
        """The right to train this stage 0, or None where another run is to train it."""
        begun = [
            other
            for other in self.waiting
            if (other.folder / 'stage_0').exists()
            and same_start(other.asked, record.asked, record.accept)
        ]
        if begun and record not in begun:
            return None  # the other run continues its own stage 0
        text = json.dumps(record.asked.start, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        lock = FileLock(record.out / f'.stage_0_{name}.lock')
        if not lock.acquire():
            return None
        if record.find_start() is not None:  # finished in this very moment
            lock.release()
            return None
        return lock

    def _spawn(self, record: Record, base: Path | None, locks: list[FileLock]) -> None:
        run = record.run
        command = [sys.executable, str(self.script), str(run.config), '--work-dir', str(record.folder)]
        command += ['--resume', *(['--base', str(base)] if base else [])]
        command += ['--cfg-options', *run.options]
        with (record.folder / 'log.txt').open('ab') as log:
            start = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | dict(OMP_NUM_THREADS=str(self.threads)),
                # Ctrl-C reaches this process alone, which then stops its children one by one.
                start_new_session=True,
                pass_fds=[lock.descriptor for lock in locks],
            )
        done = record.stages_done()
        self.running.append(Job(record, process, locks, start, time.monotonic(), done))
        origin = f', stage 0 from {base.parents[1].name}' if base else ''
        self._say(f'{run.name}: started at stage {done} of {record.asked.num_stages}{origin}')

    def _reap(self) -> None:
        for job in list(self.running):
            code = job.process.poll()
            self._note_progress(job)
            if code is not None:
                self.running.remove(job)
                self._finish(job, code)

    def _note_progress(self, job: Job) -> None:
        done = job.record.stages_done()
        if done and len(job.locks) > 1:
            job.locks.pop().release()  # stage 0 is there for the others
        if done != job.stages_done:
            job.stages_done = done
            if not self.console.is_terminal:
                self._say(f'{job.name}: {done} of {job.record.asked.num_stages} stages')

    def _finish(self, job: Job, code: int) -> None:
        for lock in job.locks:
            lock.release()
        results = job.record.results()
        minutes = (time.monotonic() - job.started) / 60
        if code == 0 and results is not None:
            self._say(f'{job.name}: finished after {minutes:.1f} min, all {results["final"]["all"]:.2f}')
            return
        self.failed.append(job.name)
        log = job.record.folder / 'log.txt'
        with log.open('rb') as file:
            lines = _last_lines(file, job.log_start)
        why = f'exit status {code}' if code else 'no results'
        self._say(f'{job.name}: failed ({why}) after {minutes:.1f} min; the end of {log}:')
        for line in lines:
            self._say(f'    {line}', with_time=False)

    def _stop(self) -> None:
        """Ends what is still running: a signal first, so that it can save, then by force."""
        for job in self.running:
            job.process.send_signal(signal.SIGTERM)
        try:
            deadline = time.monotonic() + STOP_SECONDS
            for job in self.running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for job in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
                for lock in job.locks:
                    lock.release()
            self.running.clear()

    def _show(self, status: Status | None) -> None:
        for name, holder in self._elsewhere.items():
            self._say_once(f'{name}: trained by {holder}; its result is waited for')
        if status is None:
            return
        running = [
            f'{job.name} (stage {job.stages_done} of {job.record.asked.num_stages})' for job in self.running
        ]
        status.update(
            f'{", ".join(running) or "nothing running"}; {len(self.waiting)} waiting'
            + (f', {len(self._elsewhere)} of them trained elsewhere' if self._elsewhere else '')
            + (f'; {len(self.failed)} failed' if self.failed else '')
        )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _say(self, text: str, with_time: bool = True) -> None:
        time_text = time.strftime('%H:%M:%S ') if with_time else ''
        self.console.print(f'{time_text}{text}', markup=False, highlight=False, soft_wrap=True)


def _last_lines(file: IO[bytes], start: int) -> list[str]:
    """The last lines of a log from byte ``start`` on, empty ones left out."""
    file.seek(start)
    lines = file.read().decode(errors='replace').replace('\r', '\n').splitlines()
    return [line.rstrip() for line in lines if line.strip()][-TAIL:]
