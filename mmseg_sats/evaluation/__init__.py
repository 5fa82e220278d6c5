# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Metrics of incremental learning."""

import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats.evaluation.incremental_iou import IncrementalIoUMetric

__all__ = ['IncrementalIoUMetric']
