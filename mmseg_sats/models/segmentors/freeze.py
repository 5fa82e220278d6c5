# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Parts of a model that a stage does not train: neither their parameters nor their statistics move.

Patterns name modules or parameters by their dotted names, with the wildcards of ``fnmatch`` (``*``
crosses dots); whatever lies under a named module is named too. A pattern that begins with ``!`` takes
out again what it names: ``('*', '!decode_head.conv_seg')`` is everything but the classifier.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from mmseg_sats.utils.spelling import near_match


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes parts of a model, and puts them in eval mode.

    Parameters lose ``requires_grad``, so this comes before a DDP wrapper, which would wait for their
    gradients. ``train()`` would wake the parts' dropout and running statistics again: a model calls
    :func:`hold_in_eval` at the end of its own.

    Args:
        model: the model.
        patterns: what to freeze, see above; empty for nothing.

    Raises:
        ValueError: a pattern names nothing in the model, or nothing is left to train.
    """
    _check_patterns(model, patterns)
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f'frozen={list(patterns)} leaves nothing of {type(model).__name__} to train')
    hold_in_eval(model, patterns)


def hold_in_eval(model: nn.Module, patterns: Sequence[str]) -> None:
    """Puts the modules that ``patterns`` name in eval mode: dropout off, running statistics kept.

    Modules are found by name each time, since layers may be exchanged after the model is built
    (mmengine's ``sync_bn``). The model itself keeps its mode.
    """
    for name, module in model.named_modules():
        if name and is_frozen(name, patterns):
            module.training = False


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``patterns`` name the module or parameter ``name``, or a module that it lies in."""
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
