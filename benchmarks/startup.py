# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How long a person waits for an answer of the command: help, and the import of the package."""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.measure import REPEATS, Ratio

# What is run, and the longest it should take, in seconds.
LIMITS: dict[tuple[str, ...], float] = {
    ('-m', 'mmseg_sats', '--help'): 0.5,
    ('-m', 'mmseg_sats', 'train', '--help'): 1.0,
    ('-m', 'mmseg_sats', 'add', '--help'): 1.0,
    ('-c', 'import mmseg_sats'): 0.5,
}


def measure() -> list[Ratio]:
    """Seconds from the start of a process to its end, over the longest that they should be; medians."""
    return [_ratio(words, limit) for words, limit in LIMITS.items()]


def _ratio(words: Sequence[str], limit: float) -> Ratio:
    seconds = statistics.median(_seconds(words) for _ in range(REPEATS))
    name = ' '.join(words[1:]).replace('mmseg_sats ', 'mmseg-sats ', 1)
    return Ratio(f'`{name}`', seconds / limit, 1.0, detail=f'{seconds:.2f} s, at most {limit} s')


def _seconds(words: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
