# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Joining the process group before the first stage, on GPUs or on CPUs."""

import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed


def join_process_group(cfg: Config) -> None:
    """Initialises the process group that ``cfg.launcher`` asks for; does nothing if there is one.

    mmengine's own initialisation asks for a GPU. Without one, ``torchrun`` processes meet over gloo and the
    model is wrapped without device ids; ``cfg`` is changed accordingly.

    Args:
        cfg: the run's config, with ``launcher`` and ``env_cfg``.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none':
        return
    on_cpu = not torch.cuda.is_available()
    if on_cpu and cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    if is_distributed():
        return
    if on_cpu and launcher == 'pytorch':
        torch.distributed.init_process_group('gloo')
    else:
        init_dist(launcher, **cfg.get('env_cfg', {}).get('dist_cfg', dict(backend='nccl')))
