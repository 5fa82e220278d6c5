# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What mmengine adds to a config that inherits from one of ours, or of mmseg's, by ``_base_ = 'mmseg_sats::...'``."""

from typing import Any

from mmengine.config import Config

_PACKAGE = 'mmseg_sats'


def drop_own_scope(cfg: Config) -> None:
    """Takes ``_scope_='mmseg_sats'``, and that of the default scope, out of every part of a config, in place.

    mmengine marks the parts of another package's config with the name of that package, so that they are
    looked up in its registries. Ours are registered in mmseg's: a config that names the file by its path,
    and the stages' configs, which stock mmseg reads too, have no such mark. The default scope, mmseg, is where parts
    are looked up anyway.

    Args:
        cfg: a config as it was read.
    """
    _drop(cfg._cfg_dict, (_PACKAGE, dict.get(cfg._cfg_dict, 'default_scope', 'mmseg')))


def _drop(value: Any, scopes: tuple[Any, ...]) -> None:
    if isinstance(value, dict):
        # As a plain dict: mmengine's own methods would build lazy objects.
        if dict.get(value, '_scope_') in scopes:
            dict.pop(value, '_scope_', None)
        for item in dict.values(value):
            _drop(item, scopes)
    elif isinstance(value, list | tuple):
        for item in value:
            _drop(item, scopes)
