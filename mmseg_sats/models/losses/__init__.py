# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses: pure functions, and the modules that register them."""

from mmseg_sats.models.losses.crp_loss import CRPDistillationLoss, crp_loss
from mmseg_sats.models.losses.one_vs_rest import OneVsRestLoss, one_vs_rest
from mmseg_sats.models.losses.sdr_loss import (
    PrototypeAttractionLoss,
    PrototypeMatchingLoss,
    RepulsionLoss,
    SparsityLoss,
    prototype_attraction,
    prototype_matching,
    repulsion,
    sparsity,
)
from mmseg_sats.models.losses.unbiased import (
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
    unbiased_cross_entropy,
    unbiased_distillation,
)

__all__ = [
    'CRPDistillationLoss',
    'OneVsRestLoss',
    'PrototypeAttractionLoss',
    'PrototypeMatchingLoss',
    'RepulsionLoss',
    'SparsityLoss',
    'UnbiasedCrossEntropyLoss',
    'UnbiasedDistillationLoss',
    'crp_loss',
    'one_vs_rest',
    'prototype_attraction',
    'prototype_matching',
    'repulsion',
    'sparsity',
    'unbiased_cross_entropy',
    'unbiased_distillation',
]
