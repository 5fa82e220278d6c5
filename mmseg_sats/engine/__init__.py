# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The runner that trains stage after stage, the files that it writes, and its hooks."""

import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.engine.hooks import (
    AtomicCheckpointHook,
    ClassifierAligningHook,
    ClosedFormHook,
    FiniteHook,
    NewRowsHook,
    ProgressHook,
    PrototypeHook,
    PseudoLabelThresholdHook,
    WeightFusionHook,
)
from mmseg_sats.engine.incremental_runner import IncrementalRunner
from mmseg_sats.engine.training.optim_groups import GroupedOptimWrapperConstructor
from mmseg_sats.engine.training.stage_runner import StageRunner
from mmseg_sats.engine.training.train_loop import ResumableTrainLoop

__all__ = [
    'AtomicCheckpointHook',
    'ClassifierAligningHook',
    'ClosedFormHook',
    'FiniteHook',
    'GroupedOptimWrapperConstructor',
    'IncrementalRunner',
    'NewRowsHook',
    'ProgressHook',
    'PrototypeHook',
    'PseudoLabelThresholdHook',
    'ResumableTrainLoop',
    'StageRunner',
    'WeightFusionHook',
    'unwrap',
]
