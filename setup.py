# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""For tools that look for it: everything that there is to say about the package is in pyproject.toml."""

from setuptools import setup

setup()
