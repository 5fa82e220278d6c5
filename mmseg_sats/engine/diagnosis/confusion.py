# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the pixels of each class are predicted as after a stage."""

import math
from collections.abc import Sequence

import numpy as np

from mmseg_sats.evaluation.incremental_iou import IncrementalIoUMetric


def shares(confusion: np.ndarray) -> np.ndarray:
    """Each row of a confusion (K, K) in percent of its pixels; NaN for a class that no pixel shows."""
    rows = confusion.sum(1, keepdims=True).astype(float)
    return np.divide(100.0 * confusion, rows, out=np.full(confusion.shape, math.nan), where=rows > 0)


def iou_by_class(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float | None]:
    """IoU in percent by name; None for a class that no pixel shows."""
    values = IncrementalIoUMetric.ious(IncrementalIoUMetric.areas(confusion)).tolist()
    return {name: None if math.isnan(value) else value for name, value in zip(classes, values, strict=True)}
