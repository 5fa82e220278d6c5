# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Models: attention, backbones, losses, pseudo-labels and the incremental segmentor."""

from mmseg_sats.models.attention import AttentionMap
from mmseg_sats.models.backbones import AttentionMixVisionTransformer
from mmseg_sats.models.losses import (
    CRPDistillationLoss,
    OneVsRestLoss,
    PrototypeAttractionLoss,
    PrototypeMatchingLoss,
    RepulsionLoss,
    SparsityLoss,
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
)
from mmseg_sats.models.output import SegmentorOutput
from mmseg_sats.models.prototypes import ClassPrototypes
from mmseg_sats.models.pseudo_labeler import EntropyPseudoLabeler
from mmseg_sats.models.segmentors import IncrementalEncoderDecoder
from mmseg_sats.models.sigmoid_pseudo_labeler import SigmoidPseudoLabeler

__all__ = [
    'AttentionMap',
    'AttentionMixVisionTransformer',
    'CRPDistillationLoss',
    'ClassPrototypes',
    'EntropyPseudoLabeler',
    'IncrementalEncoderDecoder',
    'OneVsRestLoss',
    'PrototypeAttractionLoss',
    'PrototypeMatchingLoss',
    'RepulsionLoss',
    'SegmentorOutput',
    'SigmoidPseudoLabeler',
    'SparsityLoss',
    'UnbiasedCrossEntropyLoss',
    'UnbiasedDistillationLoss',
]
