# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which arguments of a model's part are added by this package, and which class of mmseg the part extends."""

import inspect
from collections.abc import Iterator
from typing import Any

from mmseg.registry import MODELS

_PACKAGE = 'mmseg_sats'


def own_class(name: Any) -> type | None:
    """The class registered under a name if it belongs to this package, else None."""
    found = MODELS.get(name) if isinstance(name, str) else None
    return found if found is not None and found.__module__.split('.')[0] == _PACKAGE else None


def own_options(name: Any) -> set[str]:
    """The arguments that a class of this package adds to those of the mmseg class it extends."""
    own = own_class(name)
    if own is None:
        return set()
    parent = set(inspect.signature(stock_parent(own).__init__).parameters)
    return {
        key
        for cls in _own_bases(own)
        for key in inspect.signature(cls.__init__).parameters
        if key not in parent
    }


def _own_bases(own: type) -> Iterator[type]:
    return (cls for cls in own.__mro__ if cls.__module__.split('.')[0] == _PACKAGE)


def stock_parent(own: type) -> type:
    """The nearest base class that mmseg registers."""
    for cls in own.__mro__:
        if own_class(cls.__name__) is None and MODELS.get(cls.__name__) is cls:
            return cls
    raise ValueError(
        f'{own.__name__} extends no part of mmseg: a model with it needs this package to run'
    )
