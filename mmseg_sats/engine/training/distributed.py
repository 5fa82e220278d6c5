# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Several processes as one run: they connect, share batches and the work dir, and end together."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import (
    barrier,
    get_dist_info,
    get_world_size,
    init_dist,
    is_distributed,
    is_main_process,
)

from mmseg_sats.utils.checkpoint import write_text

# How long a process that lost another prints nothing, so that the other's error is seen first.
PATIENCE = 10.0
# Parts of gloo's messages about a process that has ended; NCCL has its own exception.
_LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'gloo')


def join_process_group(cfg: Config) -> dict[str, Any]:
    """Initialises the process group that ``cfg.launcher`` asks for, if there is none yet.

    mmengine's own initialisation needs a GPU. Without one, ``torchrun`` processes communicate over gloo
    and the model is wrapped without device ids.

    Args:
        cfg: the run's config, with ``launcher`` and ``env_cfg``.

    Returns:
        What a stage's config needs while it runs in this group; the stage's file goes without, so
        that it can be run alone.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none':
        return {}
    on_cpu = not torch.cuda.is_available()
    if not is_distributed():
        if on_cpu and launcher == 'pytorch':
            torch.distributed.init_process_group('gloo')
        else:
            init_dist(launcher, **cfg.get('env_cfg', {}).get('dist_cfg', dict(backend='nccl')))
    settings = dict(launcher=launcher)
    if on_cpu and cfg.get('model_wrapper_cfg') is None:
        settings['model_wrapper_cfg'] = dict(type='MMDistributedDataParallel', device_ids=None)
    return settings


def share_work(cfg: Config) -> None:
    """Lets the processes share the batches that one process would have, and one of them write.

    Args:
        cfg: a stage's config, changed in place where there is more than one process. Batches that
            it composes by a ``batch_sampler`` of its own, or by a sampler without epochs, are left
            to it.
    """
    if get_world_size() == 1:
        return
    loader = cfg.train_dataloader
    if not loader.get('batch_sampler') and loader.sampler.type == 'DefaultSampler':
        drop_last = loader.pop('drop_last', False)
        loader.batch_sampler = dict(type='SharedBatchSampler', drop_last=drop_last)
    logger = cfg.get('default_hooks', {}).get('logger') or {}
    if logger.get('type') == 'LoggerHook':
        logger.type = 'OneRankLoggerHook'


def check_shared(work_dir: Path) -> None:
    """Checks that all processes see the work dir that the first one writes to.

    Raises:
        FileNotFoundError: this process does not.
    """
    if not is_distributed():
        return
    mark = work_dir / '.seen_by_all'
    if is_main_process():
        write_text(mark, '')
    barrier()
    seen = mark.exists()
    barrier()
    if is_main_process():
        mark.unlink()
    if not seen:
        raise FileNotFoundError(
            f'work dir {work_dir} of {_me()} is not the one that process 0 writes to: expected a folder '
            'that all machines share, named by --work-dir'
        )


@contextmanager
def own_error_on_top() -> Iterator[None]:
    """A context in which the error of the process that failed is printed first, and only by that process.

    When one process of a run ends, the others fail in their next exchange with it. Whatever started
    them (torchrun, srun) then ends them all. They wait for this and only print where to look.
    """
    try:
        yield
    except Exception as error:
        if get_world_size() == 1:
            raise
        if not _lost_another(error):
            print(f'{_me()} failed: {type(error).__name__}: {error}', file=sys.stderr, flush=True)
            raise
        time.sleep(PATIENCE)
        print(f'{_me()} ends, for another process of the run has ended', file=sys.stderr, flush=True)
        # Not by an exception: closing a broken process group may wait for those that are gone.
        os._exit(1)


def _lost_another(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)
    )


def _me() -> str:
    rank, world_size = get_dist_info()
    return f'process {rank} of {world_size} (on {socket.gethostname()})'
