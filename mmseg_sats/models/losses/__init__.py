# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses: pure functions, and the registered modules that call them."""

from mmseg_sats.models.losses.crp_loss import CRPDistillationLoss, crp_loss
from mmseg_sats.models.losses.feature_mse import FeatureMSELoss, feature_mse
from mmseg_sats.models.losses.knowledge_distillation import (
    KnowledgeDistillationLoss,
    knowledge_distillation,
)
from mmseg_sats.models.losses.local_pod import LocalPODLoss, local_pod
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
from mmseg_sats.models.losses.self_entropy import SelfEntropyLoss, self_entropy
from mmseg_sats.models.losses.sigmoid import (
    SigmoidCrossEntropyLoss,
    SigmoidDistillationLoss,
    sigmoid_cross_entropy,
    sigmoid_distillation,
)
from mmseg_sats.models.losses.unbiased import (
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
    unbiased_cross_entropy,
    unbiased_distillation,
)

__all__ = [
    'CRPDistillationLoss',
    'FeatureMSELoss',
    'KnowledgeDistillationLoss',
    'LocalPODLoss',
    'SigmoidCrossEntropyLoss',
    'SigmoidDistillationLoss',
    'UnbiasedCrossEntropyLoss',
    'UnbiasedDistillationLoss',
    'crp_loss',
    'feature_mse',
    'knowledge_distillation',
    'local_pod',
    'sigmoid_cross_entropy',
    'sigmoid_distillation',
    'SelfEntropyLoss',
    'self_entropy',
    'OneVsRestLoss',
    'PrototypeAttractionLoss',
    'PrototypeMatchingLoss',
    'RepulsionLoss',
    'SparsityLoss',
    'one_vs_rest',
    'prototype_attraction',
    'prototype_matching',
    'repulsion',
    'sparsity',
    'unbiased_cross_entropy',
    'unbiased_distillation',
]
