# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a config of ``test_distributed.py`` imports: double precision, and hooks that tell and interfere.

Environment variables say where to interfere, for the config must be the same when a run is resumed:
``STOP_AT=STAGE:ITERATION:RANK`` sends SIGTERM to that rank, ``FAIL_AT`` raises there, ``KILL_AT`` kills.
"""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.engine.config import config_text

# A test that reads such a config imports this too, and stays as it is.
if 'pytest' not in sys.modules:
    torch.set_default_dtype(torch.float64)
    # Laying out the text of the configs takes longer than an epoch.
    config_text.FormatCode = lambda text, **_: (f'{text}\n', True)


@HOOKS.register_module()
class Tell(Hook):
    """Rank 0 leaves each iteration's losses in ``losses_from_ITERATION.json``, every rank images and a random number.

    The iteration is that from which the stage was trained or resumed.
    """

    def before_train(self, runner: Runner) -> None:
        self.first = runner.iter
        self.losses: list[dict[str, float]] = []
        self.images: list[list] = []
        self.draws: list[float] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict) -> None:
        self.losses.append({name: float(value) for name, value in outputs.items()})
        pairs = zip(data_batch['inputs'], data_batch['data_samples'], strict=True)
        self.images.append([[Path(s.img_path).name, float(i.double().sum())] for i, s in pairs])
        folder = Path(runner.work_dir)  # written every time, for the run may be stopped
        (folder / f'images_{get_rank()}_from_{self.first}.json').write_text(json.dumps(self.images))
        self.draws.append(float(torch.rand(())))  # the models themselves draw none
        (folder / f'draws_{get_rank()}_from_{self.first}.json').write_text(json.dumps(self.draws))
        if get_rank() == 0:
            (folder / f'losses_from_{self.first}.json').write_text(json.dumps(self.losses))


@HOOKS.register_module()
class Interfere(Hook):
    """Does what the environment asks for."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        here = f'{runner.work_dir.rsplit("_", 1)[1]}:{runner.iter}:{get_rank()}'
        if os.environ.get('STOP_AT') == here:
            signal.raise_signal(signal.SIGTERM)
        if os.environ.get('FAIL_AT') == here:
            print(f'FAILED AT {time.time()}', file=sys.stderr, flush=True)
            raise ValueError('the dog ate the batch')
        if os.environ.get('KILL_AT') == here:
            print(f'FAILED AT {time.time()}', file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def tell_writes(event: str, args: tuple[Any, ...]) -> None:
    """Notes the files that this process opens for writing."""
    if event != 'open' or not isinstance(args[0], str):
        return
    # Opening a folder makes a file without a name: a try, not a result.
    if (args[2] or 0) & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(args[0]):
        written.add(args[0])


written: set[str] = set()
if os.environ.get('RANK', '0') != '0':
    sys.addaudithook(tell_writes)
    atexit.register(lambda: print('WRITTEN', json.dumps(sorted(written)), flush=True))
