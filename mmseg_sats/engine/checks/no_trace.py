# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Leaves a process as it was: random numbers, warnings, environment, torch's switches and mmengine's global objects."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.utils import ManagerMixin


@contextmanager
def no_trace() -> Iterator[None]:
    """A context after which the process is as before, though a Runner was built and trained within it.

    Warnings within it are not shown, so that they are shown when the same thing happens again.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    generators = random.getstate(), np.random.get_state()
    environment = dict(os.environ)
    switches = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    known = {manager: dict(_instances(manager)) for manager in _managers(ManagerMixin)}
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = switches
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        _restore_environment(environment)
        for manager in _managers(ManagerMixin):
            _forget_new(manager, known.get(manager, {}))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _restore_environment(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def _managers(kind: type) -> Iterator[type]:
    """mmengine's loggers, message hubs, visualizers and scopes: classes that keep their instances by name."""
    for child in kind.__subclasses__():
        yield child
        yield from _managers(child)


def _instances(manager: type) -> dict[str, object]:
    return vars(manager).get('_instance_dict', {})


def _forget_new(manager: type, before: dict[str, object]) -> None:
    instances = _instances(manager)
    for name in [name for name in instances if name not in before]:
        for handler in getattr(instances.pop(name), 'handlers', ()):
            handler.close()
