# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A pass over a stage's own training images, each seen once, which says how far it is."""

import copy
import time
from collections.abc import Iterator
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import Runner

from mmseg_sats.datasets.memory.replay import stage_dataset_cfg

INTERVAL = 30.0  # seconds between two lines that say how far it is


def images_seen_once(runner: Runner, what: str) -> Iterator[dict[str, Any]]:
    """The batches of :func:`training_images_once`, with a line in the log every now and then.

    Args:
        runner: the stage's runner; its ``cfg`` and ``build_dataloader`` are used.
        what: what the pass is for, for the log.
    """
    loader = runner.build_dataloader(training_images_once(runner))
    told = time.perf_counter()
    for seen, batch in enumerate(loader, start=1):
        yield batch
        if time.perf_counter() - told >= INTERVAL:
            told = time.perf_counter()
            print_log(f'{what}: image {seen} of {len(loader)}', logger='current')


def training_images_once(runner: Runner) -> dict[str, Any]:
    """The config of a loader of the stage's training images: each once, with the transforms of the evaluation."""
    # Only the stage's own images: exemplars keep their labels, and outside images have another labeler.
    dataset = copy.deepcopy(stage_dataset_cfg(runner.cfg.train_dataloader.dataset))
    dataset.pipeline = copy.deepcopy(runner.cfg.test_pipeline)
    train = runner.cfg.train_dataloader
    cfg = dict(
        dataset=dataset,
        batch_size=1,
        num_workers=train.get('num_workers', 0),
        sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    )
    if train.get('num_batch_per_epoch'):
        # mmengine then trains only on that many images, so only these are used here.
        cfg['num_batch_per_epoch'] = train.num_batch_per_epoch * train.batch_size
    return cfg
