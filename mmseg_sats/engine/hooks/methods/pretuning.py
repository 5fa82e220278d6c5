# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Trains the rows of new classes before anything else is trained (NeST)."""

import copy
import time
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.hooks.methods.image_pass import INTERVAL
from mmseg_sats.functional.pixels.per_pixel import reduced_losses
from mmseg_sats.functional.pixels.unbiased import unbiased_cross_entropy_of_pixels
from mmseg_sats.models.heads.new_rows import MeasuredStart
from mmseg_sats.models.padding import labels_of_batch
from mmseg_sats.models.segmentors.incremental_encoder_decoder import IncrementalEncoderDecoder
from mmseg_sats.models.segmentors.old_model import ClassifierInputs

_POWER = 0.9


def pretune(
    runner: Runner, model: IncrementalEncoderDecoder, mixture: nn.Module, start: MeasuredStart
) -> None:
    """Trains what gives a classifier's rows, in place, with MiB's cross-entropy; everything else is frozen.

    The images are the stage's own, augmented and in batches as in its training. The old model gives the classifier's
    inputs, in eval mode.

    Args:
        runner: the stage's runner.
        model: its model.
        mixture: a module without arguments that returns ``weight`` (K, d) and ``bias`` (K,).
        start: ``epochs``, ``lr``, ``momentum`` and ``weight_decay`` of the training.
    """
    old = model.old_model
    inputs_of = ClassifierInputs(old, model.measured_classifier)
    loss_of = partial(unbiased_cross_entropy_of_pixels, num_old=old.model.num_classes)
    mixture.to(next(model.parameters()).device)
    parameters = list(mixture.parameters())
    optimizer = torch.optim.SGD(
        parameters, start.lr, start.momentum, weight_decay=start.weight_decay, nesterov=start.momentum > 0
    )
    loader = runner.build_dataloader(_loader_cfg(runner), seed=runner.seed)
    done, total, told = 0, start.epochs * len(loader), time.perf_counter()
    for epoch in range(start.epochs):
        _set_epoch(loader, epoch)
        for batch in loader:
            data = model.data_preprocessor(batch, True)
            labels = labels_of_batch(data['data_samples'])
            with torch.no_grad():
                features = inputs_of(data['inputs'])
            labels = labels.to(features.device)
            pixels = torch.tensor(float(labels.numel()), device=features.device)
            all_reduce(pixels)
            weight, bias = mixture()
            logits = nn.functional.conv2d(features, weight[..., None, None], bias)
            loss = reduced_losses(
                lambda maps, pixels=pixels: {'loss': maps[0].sum() / pixels}, [loss_of], logits, None, labels,
                align_corners=model.align_corners, ignore_index=model.decode_head.ignore_index,
            )['loss']  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            for parameter in parameters:
                all_reduce(parameter.grad)
            for group in optimizer.param_groups:
                group['lr'] = start.lr * (1 - done / total) ** _POWER
            optimizer.step()
            done += 1
            if done in (1, total) or time.perf_counter() - told >= INTERVAL:
                told = time.perf_counter()
                runner.logger.info(f'pre-tuning of the new rows: iteration {done} of {total}, loss {loss.item():.4g}')


def _loader_cfg(runner: Runner) -> dict[str, Any]:
    """The config of a loader of the stage's own images, as they are trained on."""
    train = runner.cfg.train_dataloader
    cfg = dict(
        dataset=copy.deepcopy(stage_dataset_cfg(train.dataset)),
        batch_size=train.batch_size,
        num_workers=train.get('num_workers', 0),
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
    if get_world_size() > 1:
        cfg['batch_sampler'] = dict(type='SharedBatchSampler')
    for key in ('num_batch_per_epoch', 'collate_fn'):
        if train.get(key):
            cfg[key] = copy.deepcopy(train[key])
    return cfg


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    """Makes order and augmentation those of an epoch."""
    for part in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None), loader.dataset):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
