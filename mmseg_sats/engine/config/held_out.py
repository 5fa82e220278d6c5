# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Choosing a stage's best epoch on training images that are held out, in place of taking the last."""

import copy

from mmengine.config import Config

from mmseg_sats.datasets.held_out import check_share


def add_held_out(cfg: Config) -> None:
    """Has a stage validated after every epoch on images that it is not trained with, in place.

    Images and masks are those of the training data, transforms and metric those of the evaluation.

    Args:
        cfg: the stage's config, its words resolved; ``held_out`` is the share, None for none.

    Raises:
        ValueError: an impossible share, training data or a loop of another kind, or a validation besides.
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
    if not cfg.train_cfg.get('by_epoch', True) or 'max_iters' in cfg.train_cfg:
        raise ValueError(
            f'held_out={share} chooses among epochs: expected a train_cfg with max_epochs, got '
            f'{dict(cfg.train_cfg)}'
        )
    train.held_out = loader.dataset.held_out = share
    # Transforms of the evaluation, whichever of the two names them.
    loader.dataset.setdefault('pipeline', loader.dataset.dataset.get('pipeline'))
    loader.dataset.dataset = copy.deepcopy(train.dataset)
    cfg.val_dataloader = loader
    cfg.val_cfg = dict(type='ValLoop')
    cfg.val_evaluator = copy.deepcopy(cfg.test_evaluator)
    # Else the epoch would be taken for the iteration on the axis of the curves.
    if cfg.get('default_hooks', {}).get('logger'):
        cfg.default_hooks.logger.log_metric_by_epoch = False
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='BestEpochHook')]
