# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Hooks for mmengine's Runner."""

from mmseg_sats.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from mmseg_sats.engine.hooks.best_epoch_hook import BestEpochHook
from mmseg_sats.engine.hooks.finite_hook import FiniteHook
from mmseg_sats.engine.hooks.methods.adaptive_weight_hook import AdaptiveWeightHook
from mmseg_sats.engine.hooks.methods.classifier_aligning_hook import ClassifierAligningHook
from mmseg_sats.engine.hooks.methods.closed_form_hook import ClosedFormHook
from mmseg_sats.engine.hooks.methods.new_rows_hook import NewRowsHook
from mmseg_sats.engine.hooks.methods.pixel_weight_hook import PixelWeightHook
from mmseg_sats.engine.hooks.methods.prototype_hook import PrototypeHook
from mmseg_sats.engine.hooks.methods.pseudo_label_threshold_hook import PseudoLabelThresholdHook
from mmseg_sats.engine.hooks.methods.weight_fusion_hook import WeightFusionHook
from mmseg_sats.engine.hooks.one_rank_logger_hook import OneRankLoggerHook
from mmseg_sats.engine.hooks.progress_hook import ProgressHook

__all__ = [
    'AdaptiveWeightHook',
    'AtomicCheckpointHook',
    'BestEpochHook',
    'ClassifierAligningHook',
    'ClosedFormHook',
    'FiniteHook',
    'NewRowsHook',
    'OneRankLoggerHook',
    'PixelWeightHook',
    'ProgressHook',
    'PrototypeHook',
    'PseudoLabelThresholdHook',
    'WeightFusionHook',
]
