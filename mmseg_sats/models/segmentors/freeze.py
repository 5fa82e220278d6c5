# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Freezes parts of a model: neither their parameters nor their running statistics change in training.

Patterns select modules or parameters by their dotted names, with the wildcards of ``fnmatch`` (``*``
also matches dots). A selected module includes everything in it. A pattern that begins with ``!`` excludes
what it matches: ``('*', '!decode_head.conv_seg')`` is everything except the classifier.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from mmseg_sats.utils.spelling import near_match


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes parts of a model, and puts them in eval mode.

    ``requires_grad`` is set to False, so call this before the model is wrapped by DDP, which would wait
    for the gradients. Since ``train()`` would put the parts back into train mode, a model must call
    :func:`hold_in_eval` at the end of its ``train()``.

    Args:
        model: the model.
        patterns: what to freeze, see above; empty for nothing.

    Raises:
        ValueError: a pattern matches nothing in the model, or nothing is left to train.
    """
    _check_patterns(model, patterns)
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f'frozen={list(patterns)} leaves nothing of {type(model).__name__} to train')
    hold_in_eval(model, patterns)


def hold_in_eval(model: nn.Module, patterns: Sequence[str]) -> None:
    """Puts the modules that ``patterns`` select in eval mode: no dropout, and running statistics do not change.

    Modules are found by name each time, since layers may be replaced after the model is built
    (by mmengine's ``sync_bn``). The mode of the model itself does not change.
    """
    for name, module in model.named_modules():
        if name and is_frozen(name, patterns):
            module.training = False


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``patterns`` select the module or parameter ``name``, or a module that contains it."""
    frozen = [pattern for pattern in patterns if not pattern.startswith('!')]
    kept = [pattern[1:] for pattern in patterns if pattern.startswith('!')]
    return _named(name, frozen) and not _named(name, kept)


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for part in _with_parents(name) for pattern in patterns)


def _with_parents(name: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    return accumulate(name.split('.'), '{}.{}'.format)


def _check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise ValueError(f'frozen={patterns!r}: expected a list of patterns, such as [{patterns!r}]')
    modules = [name for name, _ in model.named_modules() if name]
    names = modules + [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        wanted = pattern.removeprefix('!')
        if not any(fnmatchcase(name, wanted) for name in names):
            raise ValueError(
                f'frozen: {pattern!r} names no part of {type(model).__name__}'
                f'{near_match(wanted, names)}; its parts are {[n for n, _ in model.named_children()]}'
            )
