# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Data sets seen through the stages of a protocol."""

from mmseg_sats.datasets.incremental_dataset import IncrementalDataset
from mmseg_sats.datasets.saliency import MarkUnknown
from mmseg_sats.datasets.shapes import ShapesDataset
from mmseg_sats.datasets.transforms import EvaluateAsIs, RelabelSegMap

__all__ = ['EvaluateAsIs', 'IncrementalDataset', 'MarkUnknown', 'RelabelSegMap', 'ShapesDataset']
