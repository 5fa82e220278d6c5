# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Builds the model and metrics of a stage on trial, so that errors appear before any training."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from torch import nn

from mmseg_sats.engine.checks.attention import check_backbone_attention
from mmseg_sats.engine.checks.near_names import with_near_names
from mmseg_sats.evaluation import IncrementalIoUMetric
from mmseg_sats.models.backbones.input_channels import input_channels


def check_model(cfg: Config) -> nn.Module:
    """Builds the model of a stage with random weights, and checks the backbone's attention maps if they are needed.

    Returns:
        The model, without an old model.

    Raises:
        KeyError: a type is not registered; the message suggests a near match.
        TypeError: a part does not have an argument (the message suggests a near match), or a head cannot grow.
        ValueError: a part of the model refuses its arguments, activation checkpointing would have no
            effect, or the attention maps are wrong.
    """
    model = build_model(cfg)
    names = [name for name in cfg.get('activation_checkpointing') or () if 'backbone' in name]
    # mmengine wraps the forward of layers, which backbones with forward_with_attention do not call.
    if names and hasattr(model.backbone, 'forward_with_attention'):
        raise ValueError(
            f'activation_checkpointing={names} does not reach the layers of '
            f'{type(model.backbone).__name__}: expected model.backbone.with_cp=True in its place'
        )
    check_backbone_attention(cfg, model)
    return model


def check_evaluator(cfg: Config) -> None:
    """Checks that a stage's evaluation has the metric that the results need, and that no two metrics share a key.

    Args:
        cfg: a stage's config.

    Raises:
        KeyError: a metric is not registered; the message suggests a near match.
        TypeError: a metric does not have an argument.
        ValueError: there is no ``IncrementalIoUMetric``, or two metrics return the same key.
    """
    given = cfg.test_evaluator
    try:
        with _in_silence(logging.WARNING):
            metrics = Evaluator(given.get('metrics', given) if isinstance(given, dict) else given).metrics
    except KeyError as error:
        raise KeyError(f'test_evaluator: {with_near_names(error)}') from error
    # Metrics of other classes may be a user's own with the keys that the results need, so they are accepted.
    if all(isinstance(metric, IoUMetric) for metric in metrics):
        names = ', '.join(type(metric).__name__ for metric in metrics) or 'no metric'
        raise ValueError(
            f'test_evaluator has {names}: expected an IncrementalIoUMetric, which the results are made of'
        )
    owners: dict[tuple[str | None, str], BaseMetric] = {}
    for metric in metrics:
        for key in _known_keys(metric):
            other = owners.setdefault((metric.prefix, key), metric)
            if other is not metric:
                raise ValueError(
                    f'test_evaluator: {type(other).__name__} and {type(metric).__name__} both give {key}: '
                    "expected another prefix for one of them, e.g. prefix='stock'"
                )


def _known_keys(metric: BaseMetric) -> Sequence[str]:
    """Those keys of a metric's result that metrics of this package and of mmseg may both use."""
    if isinstance(metric, IncrementalIoUMetric):
        return ['mIoU']
    return ['aAcc', *metric.metrics] if isinstance(metric, IoUMetric) else []


def trains_on_one_image(cfg: Config, processes: int = 1) -> bool:
    """Whether the stage's model can be trained on a single image. A batch norm after pooling to 1 x 1 cannot.

    Args:
        cfg: the stage's config.
        processes: how many have a batch each; synchronised batch norms see the images of all.
    """
    if processes > 1 and cfg.get('sync_bn'):
        return True
    model = build_model(cfg)
    synchronised = [name for name, part in model.named_modules() if 'SyncBatchNorm' in type(part).__name__]
    model = revert_sync_batchnorm(model).train()
    for name in synchronised if processes > 1 else ():
        model.get_submodule(name).eval()
    size = cfg.get('crop_size', 512)
    height, width = (size, size) if isinstance(size, int) else size
    heads = [head for name, head in model.named_children() if name.endswith('_head')]
    heads = [one for head in heads for one in (head if isinstance(head, nn.ModuleList) else [head])]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            features = model.extract_feat(torch.zeros(1, input_channels(model), height, width))
            for head in heads:
                head(features)
    except Exception as error:
        # Any other error (e.g. no GPU, or another number of image channels) has another cause.
        return 'more than 1 value per channel' not in str(error)
    return True


@contextmanager
def _in_silence(level: int = logging.INFO) -> Iterator[None]:
    """Hides mmengine's messages up to ``level``, such as a line for every parameter; the run logs them again."""
    # logging.disable cannot be used: mmengine's loggers cache which levels are enabled.
    logger = MMLogger.get_current_instance()
    before = logger.level
    logger.setLevel(max(before, level + 1))
    try:
        yield
    finally:
        logger.setLevel(before)


def build_model(cfg: Config) -> nn.Module:
    """Builds a stage's model without pretrained weights and without an old model.

    Raises:
        KeyError: a type is not registered; the message suggests a near match.
        TypeError: a part does not have an argument; the message suggests a near match.
    """
    model = cfg.model.to_dict() | dict(old_model=None)
    model['backbone'] = model['backbone'] | dict(init_cfg=None)
    try:
        return MODELS.build(model)
    except (KeyError, TypeError) as error:
        raise type(error)(with_near_names(error)) from error
