# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Continual semantic segmentation with self-attention transfer, for MMSegmentation.

Importing the package registers its parts in mmseg's registries, which is what
``custom_imports=dict(imports=['mmseg_sats'])`` in a config asks for. From then on a config may inherit from
one of ours by ``_base_ = 'mmseg_sats::sats/segformer_b2_voc_15-1.py'``, wherever it lies.
"""

from mmengine.config.utils import MODULE2PACKAGE

import mmseg_sats.utils.oldest_torch  # before all that needs a newer one
import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats import datasets, engine, evaluation, models, visualization
from mmseg_sats.version import __version__

__all__ = ['__version__', 'datasets', 'engine', 'evaluation', 'models', 'visualization']

# The packages whose configs `_base_ = 'PACKAGE::...'` may name, each with its distribution.
MODULE2PACKAGE.setdefault('mmseg_sats', 'mmseg_sats')
