# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Building what a stage is trained with and throwing it away, so that an error comes before stage 0 is trained."""

import copy
import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, OPTIMIZERS, PARAM_SCHEDULERS, Registry
from mmseg.registry import MODELS
from torch import nn

from mmseg_sats.suggest import near_match


def check_model(cfg: Config) -> nn.Module:
    """Builds the model of a stage, its weights at random.

    Returns:
        The model, without an old model.

    Raises:
        KeyError: a type that is not registered, with a near match.
        TypeError: an argument that a part does not have, with a near match; a head that cannot grow.
        ValueError: whatever else the model's parts refuse, or activation checkpointing that would do
            nothing.
    """
    model = build_model(cfg)
    names = [name for name in cfg.get('activation_checkpointing') or () if 'backbone' in name]
    # mmengine wraps the layers' forward, and layers that give their attention are not called by it.
    if names and hasattr(model.backbone, 'forward_with_attention'):
        raise ValueError(
            f'activation_checkpointing={names} does not reach the layers of '
            f'{type(model.backbone).__name__}: expected model.backbone.with_cp=True in its place'
        )
    return model


def check_training(cfg: Config, model: nn.Module) -> None:
    """Builds optimizer, schedulers and hooks of a stage, as mmengine's ``Runner`` will.

    Args:
        cfg: the stage's config.
        model: the stage's, from :func:`check_model`.

    Raises:
        KeyError: a type that is not registered, with a near match where it is an optimizer's.
        TypeError: an argument that a part does not have.
        ValueError: whatever else the parts refuse. Every message names the config's key.
    """
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and isinstance(wrapper.get('optimizer'), dict):
        _check_registered('optim_wrapper.optimizer', wrapper.optimizer.get('type'), OPTIMIZERS)
        with _named('optim_wrapper'), _in_silence():
            optimizer = build_optim_wrapper(model, wrapper)
        schedulers = cfg.get('param_scheduler') or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            with _named('param_scheduler'):
                options = dict(end=1) | copy.deepcopy(dict(scheduler))
                PARAM_SCHEDULERS.build(options, default_args=dict(optimizer=optimizer, epoch_length=1))
    hooks = [('default_hooks', hook) for hook in (cfg.get('default_hooks') or {}).values()]
    hooks += [('custom_hooks', hook) for hook in cfg.get('custom_hooks') or []]
    for key, hook in hooks:
        if isinstance(hook, dict):
            with _named(key):
                options = copy.deepcopy(dict(hook))
                options.pop('priority', None)
                HOOKS.build(options)


def _check_registered(key: str, name: Any, registry: Registry) -> None:
    """mmengine's constructor of optimizers says only that None is no callable."""
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
def _in_silence() -> Iterator[None]:
    """mmengine logs a line for every parameter's options."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def build_model(cfg: Config) -> nn.Module:
    """A stage's model without pretrained weights and without an old model.

    Raises:
        KeyError: a type that is not registered, with a near match.
        TypeError: an argument that a part does not have, with a near match.
    """
    model = cfg.model.to_dict() | dict(old_model=None)
    model['backbone'] = model['backbone'] | dict(init_cfg=None)
    try:
        return MODELS.build(model)
    except KeyError as error:
        raise KeyError(f'{error.args[0]}{_near_type(str(error.args[0]))}') from error
    except TypeError as error:
        raise TypeError(f'{error}{_near_argument(str(error))}') from error


def _near_type(message: str) -> str:
    """The registered name that is nearest to the one in mmengine's message."""
    match = re.match(r'(\w+) is not in the', message)
    registries = (MODELS, MODELS.parent)
    names = [name for registry in registries if registry for name in registry.module_dict]
    return near_match(match[1], names) if match else ''


def _near_argument(message: str) -> str:
    """The argument that is nearest to the one in Python's message."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    part = MODELS.get(match[1]) if match else None
    return near_match(match[2], inspect.signature(part).parameters) if part else ''
