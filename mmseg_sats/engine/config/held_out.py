# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Chooses a stage's best validated weights on held-out training images, instead of taking the last ones."""

import copy

from mmengine.config import Config

from mmseg_sats.datasets.held_out import check_share
from mmseg_sats.datasets.joined_dataset import pipeline_of


def add_held_out(cfg: Config) -> None:
    """Changes a stage's config, in place, so that it is validated on images that are not trained on.

    That is after each epoch or, in a stage counted in iterations, at each ``val_interval`` of them. The images are
    held out from the training data; transforms and metric are those of the evaluation.

    Args:
        cfg: the stage's config, its variables resolved. ``held_out`` is the share of the images; None: no
            images are held out.

    Raises:
        ValueError: the share is impossible, the training data are no ``IncrementalDataset``, or the config has a
            validation of its own.
    """
    share = cfg.get('held_out')
    check_share(share)
    if share is None:
        return
    train, loader = cfg.train_dataloader.dataset, copy.deepcopy(cfg.test_dataloader)
    if train.type != 'IncrementalDataset':
        raise ValueError(
            f'held_out={share}: expected IncrementalDataset as train_dataloader.dataset, which can '
            f'hold images out, got {train.type}'
        )
    if cfg.get('val_dataloader'):
        raise ValueError(
            f'held_out={share} makes a val_dataloader of the training images, and the config has one '
            'of its own: expected one of the two'
        )
    train.held_out = loader.dataset.held_out = share
    # The transforms of the evaluation are set either on the wrapper or on the data set inside.
    loader.dataset.setdefault('pipeline', pipeline_of(loader.dataset.dataset))
    loader.dataset.dataset = copy.deepcopy(train.dataset)
    cfg.val_dataloader = loader
    cfg.val_cfg = dict(type='ValLoop')
    cfg.val_evaluator = copy.deepcopy(cfg.test_evaluator)
    # Otherwise the curves would have the epoch where the axis shows iterations.
    if cfg.get('default_hooks', {}).get('logger'):
        cfg.default_hooks.logger.log_metric_by_epoch = False
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='BestEpochHook')]
