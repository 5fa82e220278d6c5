# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses: the registered modules, and the pure functions of ``mmseg_sats.functional`` that they call."""

from mmseg_sats.functional.features.contrastive import contrastive_distillation
from mmseg_sats.functional.features.decomposed import decomposed_distillation
from mmseg_sats.functional.features.feature_mse import feature_mse
from mmseg_sats.functional.features.local_pod import local_pod
from mmseg_sats.functional.features.pooled_cube import pooled_cube
from mmseg_sats.functional.features.prototypes import (
    prototype_attraction,
    prototype_matching,
    repulsion,
    sparsity,
)
from mmseg_sats.functional.pixels.class_similarity import (
    class_similarities,
    class_similarity_distillation,
)
from mmseg_sats.functional.pixels.knowledge_distillation import knowledge_distillation
from mmseg_sats.functional.pixels.label_guided import label_guided_distillation
from mmseg_sats.functional.pixels.self_entropy import self_entropy
from mmseg_sats.functional.pixels.sigmoid import (
    one_vs_rest,
    sigmoid_cross_entropy,
    sigmoid_distillation,
)
from mmseg_sats.functional.pixels.unbiased import unbiased_cross_entropy, unbiased_distillation
from mmseg_sats.models.losses.all_stages import AccumulativeDistillationLoss
from mmseg_sats.models.losses.background_residual import (
    BackgroundFeatureLoss,
    BackgroundResidualLoss,
    OldOutputDistillationLoss,
)
from mmseg_sats.models.losses.class_similarity import ClassSimilarityDistillationLoss
from mmseg_sats.models.losses.classifier import AuxiliaryClassifierLoss, DecomposedDistillationLoss
from mmseg_sats.models.losses.contrastive import ContrastiveDistillationLoss

# The function takes the place of its module, which is imported by ``mmseg_sats.models.losses.crp_loss`` all the same.
from mmseg_sats.models.losses.crp_loss import CRPDistillationLoss, crp_loss
from mmseg_sats.models.losses.features import (
    FeatureMSELoss,
    LocalPODLoss,
    PooledCubeDistillationLoss,
)
from mmseg_sats.models.losses.pixelwise import (
    KnowledgeDistillationLoss,
    LabelGuidedDistillationLoss,
    OneVsRestLoss,
    SelfEntropyLoss,
    SigmoidCrossEntropyLoss,
    SigmoidDistillationLoss,
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
)
from mmseg_sats.models.losses.prototype_replay import (
    PrototypeReplayLoss,
    PrototypeSeparationLoss,
    PseudoLabelFeatureLoss,
)
from mmseg_sats.models.losses.sdr_loss import (
    PrototypeAttractionLoss,
    PrototypeMatchingLoss,
    RepulsionLoss,
    SparsityLoss,
)

__all__ = [
    'AccumulativeDistillationLoss',
    'AuxiliaryClassifierLoss',
    'BackgroundFeatureLoss',
    'BackgroundResidualLoss',
    'CRPDistillationLoss',
    'ClassSimilarityDistillationLoss',
    'ContrastiveDistillationLoss',
    'DecomposedDistillationLoss',
    'FeatureMSELoss',
    'KnowledgeDistillationLoss',
    'LabelGuidedDistillationLoss',
    'LocalPODLoss',
    'OldOutputDistillationLoss',
    'SigmoidCrossEntropyLoss',
    'SigmoidDistillationLoss',
    'UnbiasedCrossEntropyLoss',
    'UnbiasedDistillationLoss',
    'class_similarities',
    'class_similarity_distillation',
    'contrastive_distillation',
    'crp_loss',
    'decomposed_distillation',
    'feature_mse',
    'knowledge_distillation',
    'label_guided_distillation',
    'local_pod',
    'sigmoid_cross_entropy',
    'sigmoid_distillation',
    'SelfEntropyLoss',
    'self_entropy',
    'OneVsRestLoss',
    'PooledCubeDistillationLoss',
    'pooled_cube',
    'PrototypeAttractionLoss',
    'PrototypeMatchingLoss',
    'PrototypeReplayLoss',
    'PrototypeSeparationLoss',
    'PseudoLabelFeatureLoss',
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
