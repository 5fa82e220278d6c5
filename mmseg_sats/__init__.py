# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Continual semantic segmentation with self-attention transfer, for MMSegmentation.

Importing the package registers its parts in mmseg's registries, which is what
``custom_imports=dict(imports=['mmseg_sats'])`` in a config asks for.
"""

import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats import datasets, engine, evaluation, models, visualization
from mmseg_sats.version import __version__

__all__ = ['__version__', 'datasets', 'engine', 'evaluation', 'models', 'visualization']
