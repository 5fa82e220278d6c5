# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Stages: the runner, what it writes, and hooks."""

from mmseg_sats.engine.hooks import ProgressHook, PrototypeHook, PseudoLabelThresholdHook
from mmseg_sats.engine.incremental_runner import IncrementalRunner

__all__ = ['IncrementalRunner', 'ProgressHook', 'PrototypeHook', 'PseudoLabelThresholdHook']
