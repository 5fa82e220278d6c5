# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Registers the package's parts when a registry is first asked for a name, not when the package is imported.

A config's ``custom_imports=dict(imports=['mmseg_sats'])``, or ``import mmseg_sats`` in a program, is all that
mmengine's registries need to know the parts, whichever of mmengine and mmseg_sats is imported first. Importing
the parts takes seconds and needs mmseg. `mmseg-sats --help` and `mmseg_sats.functional` do without both, and so
does whoever only imports the package. mmengine too imports what it registers at the first look-up
(``Registry.import_from_location``), and this is where the parts are imported, once.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any


class _Watch:
    """On ``sys.meta_path``: has a module loaded as ever, and then calls a function with it, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, loaded through this object; None for every other module."""
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path.remove(self)
        self.then(module)

    def __getattr__(self, name: str) -> Any:
        """Whoever looks at the module without importing it sees its own loader."""
        if name == 'loader':
            raise AttributeError(name)
        return getattr(self.loader, name)


def register_on_first_use(register: Callable[[], None]) -> None:
    """Has a function called before the first look-up in any of mmengine's registries.

    Args:
        register: imports what registers the parts.
    """

    def watch_registries(module: ModuleType) -> None:
        """Has ``register`` called before the first look-up in the registries of mmengine's module."""
        # The packages whose configs `_base_ = 'PACKAGE::...'` may name, each with its distribution.
        module.MODULE2PACKAGE.setdefault('mmseg_sats', 'mmseg_sats')
        if not _is_distribution(module.MODULE2PACKAGE['mmseg']):
            # The maintained fork has another name; mmengine looks for the module then.
            module.MODULE2PACKAGE['mmseg'] = 'mmseg'
        stock = module.Registry.import_from_location

        def import_from_location(registry: Any) -> None:
            """mmengine's, behind the first call of ``register``."""
            # First, because the parts may look names up while they are imported.
            module.Registry.import_from_location = stock
            try:
                register()
            except BaseException:
                module.Registry.import_from_location = import_from_location
                raise
            stock(registry)

        module.Registry.import_from_location = import_from_location

    registries = 'mmengine.registry.registry'
    if registries in sys.modules:
        watch_registries(sys.modules[registries])
    else:
        sys.meta_path.insert(0, _Watch(registries, watch_registries))
    if 'mmseg' not in sys.modules:
        quietly = 'mmseg_sats.utils.stock_messages'
        sys.meta_path.insert(0, _Watch('mmseg', lambda _: import_module(quietly)))


def _is_distribution(name: str) -> bool:
    """Whether something is installed under this name."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
