# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Models: attention, backbones, losses, pseudo-labels and the incremental segmentor."""

import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats.models.attention import AttentionMap, WindowAttentionMap
from mmseg_sats.models.backbones import (
    AttentionMixVisionTransformer,
    AttentionPCPVT,
    AttentionSVT,
    AttentionSwinTransformer,
    AttentionVisionTransformer,
    check_attention,
)
from mmseg_sats.models.heads.cascade import CascadeHead
from mmseg_sats.models.heads.segformer_head import LeanSegformerHead
from mmseg_sats.models.losses import (
    AccumulativeDistillationLoss,
    AuxiliaryClassifierLoss,
    BackgroundFeatureLoss,
    BackgroundResidualLoss,
    ClassSimilarityDistillationLoss,
    ContrastiveDistillationLoss,
    CRPDistillationLoss,
    DecomposedDistillationLoss,
    FeatureMSELoss,
    KnowledgeDistillationLoss,
    LabelGuidedDistillationLoss,
    LocalPODLoss,
    OldOutputDistillationLoss,
    OneVsRestLoss,
    PooledCubeDistillationLoss,
    PrototypeAttractionLoss,
    PrototypeMatchingLoss,
    PrototypeReplayLoss,
    PrototypeSeparationLoss,
    PseudoLabelFeatureLoss,
    RepulsionLoss,
    SelfEntropyLoss,
    SigmoidCrossEntropyLoss,
    SigmoidDistillationLoss,
    SparsityLoss,
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
)
from mmseg_sats.models.parts import DistillationPart, PseudoLabeler
from mmseg_sats.models.prototypes import ClassPrototypes, ReplayPrototypes
from mmseg_sats.models.pseudo_labels.entropy import EntropyPseudoLabeler
from mmseg_sats.models.pseudo_labels.old_model import FusedPseudoLabeler, OldModelPseudoLabeler
from mmseg_sats.models.pseudo_labels.pixel_weights import UncertaintyBalanceWeights
from mmseg_sats.models.pseudo_labels.selective import SelectivePseudoLabeler
from mmseg_sats.models.pseudo_labels.sigmoid import SigmoidPseudoLabeler
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors import AdaptiveWeight, IncrementalEncoderDecoder

__all__ = [
    'AccumulativeDistillationLoss',
    'AdaptiveWeight',
    'AttentionMap',
    'AttentionMixVisionTransformer',
    'AttentionPCPVT',
    'AttentionSVT',
    'AttentionSwinTransformer',
    'AttentionVisionTransformer',
    'AuxiliaryClassifierLoss',
    'BackgroundFeatureLoss',
    'BackgroundResidualLoss',
    'CRPDistillationLoss',
    'CascadeHead',
    'ClassPrototypes',
    'ClassSimilarityDistillationLoss',
    'ContrastiveDistillationLoss',
    'DecomposedDistillationLoss',
    'DistillationPart',
    'EntropyPseudoLabeler',
    'FeatureMSELoss',
    'IncrementalEncoderDecoder',
    'KnowledgeDistillationLoss',
    'LabelGuidedDistillationLoss',
    'LeanSegformerHead',
    'LocalPODLoss',
    'SegmentorOutput',
    'SigmoidCrossEntropyLoss',
    'SigmoidDistillationLoss',
    'FusedPseudoLabeler',
    'OldModelPseudoLabeler',
    'OldOutputDistillationLoss',
    'SelectivePseudoLabeler',
    'SelfEntropyLoss',
    'OneVsRestLoss',
    'PooledCubeDistillationLoss',
    'PrototypeAttractionLoss',
    'PrototypeMatchingLoss',
    'PrototypeReplayLoss',
    'PrototypeSeparationLoss',
    'PseudoLabelFeatureLoss',
    'PseudoLabeler',
    'ReplayPrototypes',
    'RepulsionLoss',
    'SigmoidPseudoLabeler',
    'SparsityLoss',
    'UnbiasedCrossEntropyLoss',
    'UnbiasedDistillationLoss',
    'UncertaintyBalanceWeights',
    'WindowAttentionMap',
    'check_attention',
]
