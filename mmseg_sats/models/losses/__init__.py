# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses: pure functions, and the modules that register them."""

from mmseg_sats.models.losses.crp_loss import CRPDistillationLoss, crp_loss
from mmseg_sats.models.losses.self_entropy import SelfEntropyLoss, self_entropy
from mmseg_sats.models.losses.unbiased import (
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
    unbiased_cross_entropy,
    unbiased_distillation,
)

__all__ = [
    'CRPDistillationLoss',
    'SelfEntropyLoss',
    'UnbiasedCrossEntropyLoss',
    'UnbiasedDistillationLoss',
    'crp_loss',
    'self_entropy',
    'unbiased_cross_entropy',
    'unbiased_distillation',
]
