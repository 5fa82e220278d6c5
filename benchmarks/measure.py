# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Time and memory of functions, measured so that ratios hold on a busy machine too."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]

PRECISIONS = {'bf16': torch.bfloat16, 'fp32': None, 'fp16': torch.float16}
"""What autocast works in, by name; None without it."""
REPEATS = 7
"""The least number of measured calls behind a median."""


@dataclass(frozen=True)
class Ratio:
    """One figure of a benchmark.

    Args:
        name: what is compared, the same from run to run.
        value: the ratio, without a unit.
        limit: what it should be at most, or at least where ``more_is_better``; None without a goal.
        more_is_better: whether a larger value is the better one.
        detail: what the two sides were, e.g. '1.9 s over 1.6 s'.
    """

    name: str
    value: float
    limit: float | None = None
    more_is_better: bool = False
    detail: str = ''

    @property
    def met(self) -> bool:
        """Whether the goal is reached; True without a goal."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.more_is_better else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)


def median_seconds(
    works: Mapping[str, Work], repeats: int = REPEATS, warmup: int = 1, *, wall: bool = False
) -> dict[str, float]:
    """The median duration of each function, called in turns.

    One call of each, then the next of each: what else the machine does meets all alike. With a
    single thread on the CPU it is the thread's own time that counts, which other processes touch
    only through caches; otherwise the time that passes, the device's work included.

    Args:
        works: what to call, by name.
        repeats: measured calls of each, 7 at least.
        warmup: calls of each before.
        wall: whether the time that passes counts in any case, as it must where processes help.

    Raises:
        ValueError: for fewer repeats than 7.
    """
    if repeats < REPEATS:
        raise ValueError(f'repeats={repeats}: a median of fewer than {REPEATS} says too little')
    times: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.freeze()  # what stands now is not gone through before each call
    try:
        for turn in range(warmup + repeats):
            for name, work in works.items():
                seconds = _seconds(work, wall)
                if turn >= warmup:
                    times[name].append(seconds)
    finally:
        gc.unfreeze()
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(work: Work, wall: bool) -> float:
    gc.collect()
    clock = time.perf_counter if wall or _parallel() else time.thread_time
    finish_device()
    start = clock()
    work()
    finish_device()
    return clock() - start


def _parallel() -> bool:
    return torch.cuda.is_available() or torch.get_num_threads() > 1


def finish_device() -> None:
    """Waits for what the device has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Work, *, host: bool = False) -> int:
    """How far memory rises above what was held before, while ``work`` runs (the second call of two).

    On a GPU what its tensors take; on the CPU the process's resident memory, which holds everything
    (Linux only: the kernel's own high-water mark, set back before), freed memory returned at once.

    Args:
        work: what to call.
        host: whether the process's memory counts where there is a GPU, too.
    """
    work()
    gc.collect()
    if torch.cuda.is_available() and not host:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with _freed_memory_returned():
        trim()
        Path('/proc/self/clear_refs').write_text('5')
        before = _status('VmRSS')
        work()
        return _status('VmHWM') - before


def resident_bytes() -> int:
    """The process's resident memory, what was freed given back first."""
    gc.collect()
    trim()
    return _status('VmRSS')


def trim() -> None:
    """Asks the C library to give freed memory back, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL('libc.so.6').malloc_trim(0)


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Within it, the C library returns every array of 64 KiB or more when it is freed.

    That takes time, a fault for each page of each new array, so what is timed must not run in it.
    """
    _set_thresholds(64 * 2**10, 64 * 2**10)
    try:
        yield
    finally:
        # What the library's own rule comes to in a process that has freed large arrays.
        _set_thresholds(32 * 2**20, 64 * 2**20)


def _set_thresholds(mmap: int, trim_above: int) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL('libc.so.6')
        library.mallopt(-3, mmap)  # M_MMAP_THRESHOLD
        library.mallopt(-1, trim_above)  # M_TRIM_THRESHOLD


def _status(field: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field + ':'):
            return int(line.split()[1]) * 1024
    raise OSError(f'/proc/self/status has no {field}: memory can be measured on Linux only')


def device() -> torch.device:
    """Where the benchmarks run: the GPU if there is one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
