# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Continual semantic segmentation with self-attention transfer, for MMSegmentation.

Importing the package makes its parts known to mmseg's registries, which is what
``custom_imports=dict(imports=['mmseg_sats'])`` in a config asks for. From then on a config may inherit from
one of ours by ``_base_ = 'mmseg_sats::sats/segformer_b2_voc_15-1.py'``, wherever it lies.

It imports nothing that takes time: the parts are imported when a registry is first asked for a name, and
``mmseg_sats.models`` and the others when they are first used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mmseg_sats.utils.first_use import register_on_first_use
from mmseg_sats.version import __version__

if TYPE_CHECKING:
    from mmseg_sats import (
        api,
        datasets,
        engine,
        evaluation,
        functional,
        models,
        protocol,
        visualization,
    )
    from mmseg_sats.api import add_classes, load_run, train
    from mmseg_sats.protocol import Protocol, Stage

__all__ = [
    'Protocol', 'Stage', '__version__', 'add_classes', 'api', 'datasets', 'engine', 'evaluation', 'functional',
    'load_run', 'models', 'protocol', 'train', 'visualization',
]  # fmt: skip

# What registers parts.
_REGISTERING = ('datasets', 'engine', 'evaluation', 'models', 'visualization')
# Functions and classes, each with the module that has it.
_HOMES = {
    'Protocol': 'protocol', 'Stage': 'protocol', 'add_classes': 'api', 'load_run': 'api', 'train': 'api',
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
    elif name in __all__:
        found = import_module(f'{__name__}.{name}')
    else:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    # Without mmseg there is nothing to register, and mmengine and `functional` work on.
    if find_spec('mmcv') and find_spec('mmseg'):
        for name in _REGISTERING:
            import_module(f'{__name__}.{name}')


register_on_first_use(_register)
