# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Random numbers that depend on where a run stands and on nothing that came before.

A draw is made from a key such as (seed, stage, epoch, index). A run that goes on after an
interruption, or loads its images with another number of workers, meets the same keys and so draws
the same numbers; no generator's state has to be kept, on any rank.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _words(key: tuple[int, ...]) -> np.ndarray:
    """Eight well-mixed 32-bit words of a key of whole numbers from 0."""
    # The length in front: to NumPy zeros at the end of a key are as good as none.
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
        key: whole numbers from 0, e.g. seed, stage, iteration; none of them has the same effect
            in another's place.
    """
    words = _words(key)
    _seed_cpu(words)
    torch.manual_seed(_torch_seed(words))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within the block, Python, NumPy and torch on the CPU draw from ``key``; then as before it.

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
