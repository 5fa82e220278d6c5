# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Importing this refuses a torch that is too old; requirements/runtime.txt says why pip does not."""

import re

import torch

OLDEST = (2, 4)


def check_torch(version: str) -> None:
    """Compares a version of torch with the oldest one that works.

    Args:
        version: such as ``2.13.0+cpu``.

    Raises:
        ImportError: it is older.
    """
    if tuple(int(number) for number in re.findall(r'\d+', version)[:2]) < OLDEST:
        raise ImportError(f'mmseg_sats needs torch {".".join(map(str, OLDEST))} or newer, found {version}')


check_torch(torch.__version__)
