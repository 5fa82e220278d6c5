# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Converts configs that an earlier version wrote to the names of this version, so that its runs can be resumed."""

from typing import Any

from mmseg_sats.engine.config.variables import RENAMED_VARIABLES

# Every config used to list these hooks. Now they are added by the parts of a method that need them.
_LISTED_BY_ALL = ({'type': 'PseudoLabelThresholdHook'}, {'type': 'PrototypeHook'})

# Options of IncrementalDataset that configs of earlier versions lack.
_ADDED = ('background', 'no_background', 'mask_values', 'mask_root')


def in_current_names(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of a run's config with the names of this version.

    Args:
        content: the config as a plain dict. Options of the data that came later are set.
    """
    renamed = {
        f'${old}': f'${new}' for old, new in RENAMED_VARIABLES.items() if old not in content
    }
    current = _replace(content, renamed)
    if isinstance(hooks := current.get('custom_hooks'), list):
        current['custom_hooks'] = [hook for hook in hooks if hook not in _LISTED_BY_ALL]
    for part in ('train_dataloader', 'test_dataloader'):
        dataset = (current.get(part) or {}).get('dataset')
        if isinstance(dataset, dict) and dataset.get('type') == 'IncrementalDataset':
            current[part] = current[part] | dict(dataset={name: f'${name}' for name in _ADDED} | dataset)
    return current


def _replace(value: Any, renamed: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replace(item, renamed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replace(item, renamed) for item in value)
    return renamed.get(value, value) if isinstance(value, str) else value
