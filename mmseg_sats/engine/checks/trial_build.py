# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Builds the model, optimizer and metrics of a stage on trial, so that errors appear before any training."""

import copy
import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, OPTIMIZERS, PARAM_SCHEDULERS, Registry
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS, MODELS
from torch import nn

from mmseg_sats.engine.checks.attention import check_backbone_attention
from mmseg_sats.evaluation import IncrementalIoUMetric
from mmseg_sats.models.backbones.input_channels import input_channels
from mmseg_sats.utils.spelling import near_match, one_slip

# What mmengine's runner is asked to call beside its own moments.
STAGE_MOMENTS = ('before_stage', 'before_snapshot', 'after_stage')


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


def check_training(cfg: Config, model: nn.Module) -> None:
    """Builds the optimizer and schedulers of a stage as mmengine's ``Runner`` will, and checks its hooks' arguments.

    Args:
        cfg: the stage's config.
        model: the stage's model, from :func:`check_model`.

    Raises:
        KeyError: a type is not registered; for an optimizer or a hook the message suggests a near match.
        TypeError: an optimizer, scheduler or hook does not have an argument.
        ValueError: they refuse their arguments otherwise. Every message names the config's key.
    """
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and isinstance(wrapper.get('optimizer'), dict):
        _check_registered('optim_wrapper.optimizer', wrapper.optimizer.get('type'), OPTIMIZERS)
        with _named('optim_wrapper'), _in_silence():
            optimizer = build_optim_wrapper(model, wrapper)
        schedulers = cfg.get('param_scheduler') or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            with _named('param_scheduler'):
                options = copy.deepcopy(dict(scheduler))
                # By default, mmengine ends a schedule at the end of training.
                limits = cfg.get('train_cfg') or {}
                last = limits.get('max_epochs') or limits.get('max_iters') or 1
                options.setdefault('end', max(options.get('begin', 0) + 1, last))
                PARAM_SCHEDULERS.build(options, default_args=dict(optimizer=optimizer, epoch_length=1))
    for limit in ('max_epochs', 'max_iters'):
        value = (cfg.get('train_cfg') or {}).get(limit, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'train_cfg.{limit}={value!r}: expected a whole number from 1')
    _check_hooks(cfg)


def _check_hooks(cfg: Config) -> None:
    hooks = [('default_hooks', hook) for hook in (cfg.get('default_hooks') or {}).values()]
    hooks += [('custom_hooks (or method_hooks)', hook) for hook in cfg.get('custom_hooks') or []]
    for key, hook in hooks:
        if isinstance(hook, dict):
            check_moments(_check_hook(key, hook))


def check_moments(hook: type) -> None:
    """Refuses a hook with a method of nearly the name that is called at the border of a stage.

    Raises:
        ValueError: the method, and the name that it is near to.
    """
    for name in dir(hook):
        if name not in STAGE_MOMENTS and any(one_slip(name, moment) for moment in STAGE_MOMENTS):
            raise ValueError(f'{hook.__name__}.{name} is called by nothing{near_match(name, STAGE_MOMENTS)}')


def _check_hook(key: str, hook: dict[str, Any]) -> type:
    """Checks a hook's type and arguments without building it, since building may need things that only a run has."""
    options = {name: value for name, value in hook.items() if name not in ('type', 'priority')}
    kind = hook.get('type')
    if kind is None:
        raise KeyError(f'{key}: {dict(hook)} has no type: expected the name of a hook that the config has, or a type')
    if isinstance(kind, str):
        with HOOKS.switch_scope_and_registry(None) as registry:
            kind = registry.get(hook['type'])
        if kind is None:
            close = near_match(hook['type'], [*registry.module_dict, *HOOKS.module_dict])
            raise KeyError(f'{key}: {hook["type"]} is not in the registry of hooks{close}')
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise TypeError(f'{key}: {kind.__name__} {error}') from error
    return kind


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
        name = str(error.args[0]).split(' ')[0]
        raise KeyError(f'test_evaluator: {error.args[0]}{near_match(name, METRICS.module_dict)}') from error
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


def _check_registered(key: str, name: Any, registry: Registry) -> None:
    """Checks that an optimizer is registered. mmengine's own message would only be that None is not callable."""
    with registry.switch_scope_and_registry(None) as found:
        if isinstance(name, str) and found.get(name) is None:
            close = near_match(name, [*registry.module_dict])
            raise KeyError(f'{key}.type={name!r} is not registered{close}: expected an optimizer of torch')


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Puts ``key`` before the message of an error."""
    try:
        yield
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        kind = type(error) if isinstance(error, KeyError | TypeError) else ValueError
        message = str(error.args[0]) if error.args else repr(error)
        if isinstance(error, KeyError):
            # mmengine's registries raise it again with its text in quotes.
            message = message.strip('"\'')
        raise kind(f'{key}: {message}') from error


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
    except KeyError as error:
        raise KeyError(_not_registered(str(error.args[0]))) from error
    except TypeError as error:
        raise TypeError(f'{error}{_near_argument(str(error))}') from error


def _not_registered(message: str) -> str:
    """mmengine's message that a type is not registered, with the nearest name, or what may be missing."""
    match = re.match(r'(\w+) is not in the', message)
    registries = (MODELS, MODELS.parent)
    names = [name for registry in registries if registry for name in registry.module_dict]
    close = near_match(match[1], names) if match else ''
    missing = "; is the module that registers it in the method's method_imports?" if match and not close else ''
    return f'{message}{close}{missing}'


def _near_argument(message: str) -> str:
    """A hint at the argument that is nearest to the one in Python's message, or ''."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    part = MODELS.get(match[1]) if match else None
    return near_match(match[2], inspect.signature(part).parameters) if part else ''
