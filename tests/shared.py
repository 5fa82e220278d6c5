# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Where the tests find real data, which is never part of the project."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get('MMSEG_SATS_SHARED', Path(__file__).parents[2] / 'shared'))


def shared_path(name: str) -> Path:
    """The file or folder ``name`` of the shared data; skips the test, saying why, where it is absent."""
    path = SHARED / name
    own = path.name.upper()  # VOC_MINI, CCP_MINI
    path = Path(os.environ.get(own, path))
    if not path.exists():
        pytest.skip(f'{name} is not at {path} (set MMSEG_SATS_SHARED or {own})')
    return path
