# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a method needs besides its losses: modules to import, and hooks."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from mmengine.config import Config
from mmengine.registry import HOOKS
from mmseg.registry import MODELS

from mmseg_sats.models.heads.new_rows import hooks_of_start
from mmseg_sats.models.parts import DistillationPart, PseudoLabeler, flag, with_wrapped
from mmseg_sats.utils.user_modules import add_imports, import_modules


def import_method(cfg: Config) -> None:
    """Imports the modules that ``method_imports`` names and adds them to ``custom_imports``, in place.

    A method's file cannot set ``custom_imports`` itself, because mmengine does not allow the same key in two
    bases of a config.

    Args:
        cfg: a run's config.

    Raises:
        ValueError: a module is not found, or cannot be imported.
        TypeError: ``method_imports`` is not a list of names.
    """
    names = cfg.pop('method_imports', None) or []
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError(f'method_imports={names!r}: expected a list of names of modules')
    if not names:
        return
    import_modules(cfg, names, 'method_imports')
    add_imports(cfg, names)


def add_method_hooks(cfg: Config) -> None:
    """Adds the hooks of ``method_hooks`` and of the model's parts to ``custom_hooks``, in place.

    A part's hook is not added if the config already has a hook of the same class. A name stands for a hook without
    arguments, because a command line cannot write more.

    Args:
        cfg: a stage's config, its variables resolved.

    Raises:
        TypeError: ``method_hooks`` is not a list of hooks.
    """
    hooks = cfg.pop('method_hooks', None) or []
    if not isinstance(hooks, list | tuple):
        raise TypeError(f'method_hooks={hooks!r}: expected a list of configs or names of hooks')
    hooks = [dict(type=hook) if isinstance(hook, str) else hook for hook in hooks]
    own = list(cfg.get('custom_hooks') or [])
    there = [hook_class(hook) for hook in [*own, *hooks]]
    brought = []
    for hook in hooks_of_parts(cfg.get('model') or {}):
        kind = hook_class(hook)
        if hook not in brought and not any(isinstance(one, type) and issubclass(one, kind) for one in there):
            brought.append(hook)
    if brought or hooks:
        cfg.custom_hooks = [*brought, *own, *hooks]


def hook_class(hook: Any) -> type | None:
    """The class of a hook or of a hook's config; None if it is not registered."""
    kind = hook.get('type') if isinstance(hook, Mapping) else type(hook)
    return HOOKS.get(kind) if isinstance(kind, str) else kind


def hooks_of_parts(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configs of the hooks that the parts of a model need.

    Args:
        model: config of an ``IncrementalEncoderDecoder``.
    """
    labelers = [model.get('pseudo_labeler'), model.get('outside_labeler')]
    others = [model.get('prototypes'), model.get('pixel_weights'), *(model.get('distillation') or {}).values()]
    hooks = [dict(hook) for hook in hooks_of_start(model.get('classifier_init'))]
    for base, parts in ((PseudoLabeler, labelers), (DistillationPart, others)):
        for kind in _classes(parts):
            hooks += [dict(hook) for hook in flag(kind, 'hooks', base)]
    return hooks


def needs_all_teachers(model: Mapping[str, Any]) -> bool:
    """Whether a part of a model, an ``IncrementalEncoderDecoder``'s config, needs the models of all earlier stages."""
    parts = (model.get('distillation') or {}).values()
    return any(flag(kind, 'needs_all_teachers', DistillationPart) for kind in _classes(parts))


def _classes(parts: Iterable[Any]) -> Iterator[type]:
    """The classes of those configs of parts, and of the parts that they wrap, whose class is known."""
    for part in chain.from_iterable(map(with_wrapped, parts)):
        kind = part['type']
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if kind is not None:
            yield kind
