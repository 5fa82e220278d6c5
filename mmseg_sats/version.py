# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The version of the package, in the one place that pyproject.toml reads too."""

__version__ = '0.1.0'
