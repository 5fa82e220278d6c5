# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Joining the process group before the first stage, on GPUs or on CPUs."""

from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed


def join_process_group(cfg: Config) -> dict[str, Any]:
    """Initialises the process group that ``cfg.launcher`` asks for, if there is none yet.

    mmengine's own initialisation asks for a GPU. Without one, ``torchrun`` processes meet over gloo
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
