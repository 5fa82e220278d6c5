# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Warnings for names of earlier versions, which keep working for one more version after they were renamed."""

import warnings


def warn_renamed(old: str, new: str) -> None:
    """Warns that ``old`` is now called ``new``."""
    warnings.warn(
        f'{old} is called {new} now; the earlier name works until version 0.2',
        FutureWarning,
        stacklevel=3,
    )
