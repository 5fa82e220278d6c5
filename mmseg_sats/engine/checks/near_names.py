# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Adds the nearest name to what mmengine and Python say of a type or an argument that does not exist."""

import inspect
import re
from collections.abc import Iterator

import mmengine.registry
import mmseg.registry
from mmengine.registry import Registry

from mmseg_sats.utils.spelling import near_match, text_of


def with_near_names(error: Exception) -> str:
    """The first line of an error's message, with the nearest name where a name is not known.

    mmengine's advice behind its first sentence is left out.
    """
    text = text_of(error).strip()
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0]).strip('"\'')  # mmengine's registries raise it again with its text in quotes
    text = text.split('\n')[0]
    if unknown := re.match(r'(\w+) is not in the (\S+)::([\w ]+) registry', text):
        close = near_match(unknown[1], [name for one in _registries(unknown[3]) for name in one.module_dict])
        missing = '' if close else '; is the module that registers it in custom_imports or method_imports?'
        return f'{unknown[0]}{close}{missing}'
    if refused := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        owner = next((part for one in _registries() if (part := one.module_dict.get(refused[1]))), None)
        close = near_match(refused[2], inspect.signature(owner).parameters) if owner else ''
        return text + (close or '; an inherited argument is left out by _delete_=True beside the type')
    return text


def _registries(name: str | None = None) -> Iterator[Registry]:
    """mmengine's and mmseg's registries, those with the given name if there is one."""
    for module in (mmseg.registry, mmengine.registry):
        for value in vars(module).values():
            if isinstance(value, Registry) and name in (None, value.name):
                yield value
