# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Data sets seen through the stages of a protocol."""

import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats.datasets.folder import FolderDataset
from mmseg_sats.datasets.incremental_dataset import IncrementalDataset
from mmseg_sats.datasets.memory.outside import ImageFolder, OutsideDataset, Unlabelled
from mmseg_sats.datasets.memory.replay import ReplayDataset
from mmseg_sats.datasets.memory.replay_sampler import ReplayBatchSampler
from mmseg_sats.datasets.memory.selection import (
    ClassBalancedMemory,
    MostLabelledMemory,
    RandomMemory,
    ReservoirMemory,
)
from mmseg_sats.datasets.memory.shared_batches import SharedBatchSampler
from mmseg_sats.datasets.saliency import MarkUnknown
from mmseg_sats.datasets.shapes.dataset import ShapesDataset
from mmseg_sats.datasets.transforms import EvaluateAsIs, RelabelSegMap

__all__ = [
    'ClassBalancedMemory',
    'EvaluateAsIs',
    'FolderDataset',
    'ImageFolder',
    'IncrementalDataset',
    'MarkUnknown',
    'MostLabelledMemory',
    'OutsideDataset',
    'RandomMemory',
    'RelabelSegMap',
    'ReplayBatchSampler',
    'ReplayDataset',
    'ReservoirMemory',
    'ShapesDataset',
    'SharedBatchSampler',
    'Unlabelled',
]
