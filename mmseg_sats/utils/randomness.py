# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Random numbers that depend only on the position in a run, not on what was drawn before.

Random numbers are derived from a key such as (seed, stage, epoch, index). A run that is resumed, or
that loads its images with another number of workers, uses the same keys and so draws the same
numbers. The state of a generator need not be saved on any rank.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _words(key: tuple[int, ...]) -> np.ndarray:
    """Eight well-mixed 32-bit words from a key of non-negative whole numbers."""
    # The length comes first, because NumPy ignores zeros at the end of a key.
    return np.random.SeedSequence((len(key), *key)).generate_state(8)


def _seed_cpu(words: np.ndarray) -> None:
    random.seed(words[:4].tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(_torch_seed(words))


def _torch_seed(words: np.ndarray) -> int:
    return int(words[0]) << 32 | int(words[1])


def seed_all(*key: int) -> None:
    """Sets the generators of Python, NumPy and torch (every device's) from ``key``.

    Args:
        key: non-negative whole numbers, e.g. seed, stage, iteration. Their order matters.
    """
    words = _words(key)
    _seed_cpu(words)
    torch.manual_seed(_torch_seed(words))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch (CPU) from ``key`` inside a ``with`` block and restores their states after it.

    Args:
        key: see :func:`seed_all`.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(_words(key))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
