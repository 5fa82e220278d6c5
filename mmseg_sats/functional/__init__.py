# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The method without mmengine, mmcv and mmseg: attention maps, losses and pseudo-labels as functions on tensors.

It needs torch and nothing else. docs/component.md uses it in a training loop. The registered modules in
``mmseg_sats.models`` are these functions with arguments that a config can set.
"""

import mmseg_sats.utils.oldest_torch  # noqa: F401  before all that needs a newer one
from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.functional.attention.projections import attend_with_map, map_of_qkv
from mmseg_sats.functional.attention.window_attention_map import WindowAttentionMap
from mmseg_sats.functional.attention.windows import Windows
from mmseg_sats.functional.features.contrastive import contrastive_distillation
from mmseg_sats.functional.features.crp_loss import crp_loss
from mmseg_sats.functional.features.decomposed import decomposed_distillation
from mmseg_sats.functional.features.feature_mse import feature_mse
from mmseg_sats.functional.features.local_pod import fold_new_into_background, local_pod
from mmseg_sats.functional.features.pooled_cube import pooled_cube
from mmseg_sats.functional.features.prototypes import (
    prototype_attraction,
    prototype_matching,
    repulsion,
    sparsity,
)
from mmseg_sats.functional.over_ranks import sum_over_ranks
from mmseg_sats.functional.pixels.class_similarity import (
    class_similarities,
    class_similarity_distillation,
)
from mmseg_sats.functional.pixels.knowledge_distillation import knowledge_distillation
from mmseg_sats.functional.pixels.label_guided import label_guided_distillation
from mmseg_sats.functional.pixels.means import mean_over_labels, mean_over_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk, per_pixel_losses
from mmseg_sats.functional.pixels.self_entropy import self_entropy
from mmseg_sats.functional.pixels.sigmoid import (
    one_vs_rest,
    sigmoid_cross_entropy,
    sigmoid_distillation,
)
from mmseg_sats.functional.pixels.unbiased import unbiased_cross_entropy, unbiased_distillation
from mmseg_sats.functional.pseudo_labels.entropy import (
    confident_share,
    count_entropies,
    entropy_labels,
    entropy_thresholds,
    no_entropies,
)
from mmseg_sats.functional.pseudo_labels.old_model import fill_background, fused_labels, old_labels
from mmseg_sats.functional.pseudo_labels.pixel_weights import (
    certainty_weights,
    class_balance_weights,
)
from mmseg_sats.functional.pseudo_labels.selective import selective_labels
from mmseg_sats.functional.pseudo_labels.sigmoid import sigmoid_labels
from mmseg_sats.protocol import Protocol, Stage

__all__ = [
    'AttentionMap',
    'BaseAttentionMap',
    'PixelChunk',
    'Protocol',
    'Stage',
    'WindowAttentionMap',
    'Windows',
    'attend_with_map',
    'certainty_weights',
    'class_balance_weights',
    'class_similarities',
    'class_similarity_distillation',
    'confident_share',
    'contrastive_distillation',
    'count_entropies',
    'crp_loss',
    'decomposed_distillation',
    'entropy_labels',
    'entropy_thresholds',
    'feature_mse',
    'fill_background',
    'fold_new_into_background',
    'fused_labels',
    'knowledge_distillation',
    'label_guided_distillation',
    'local_pod',
    'map_of_qkv',
    'mean_over_labels',
    'mean_over_pixels',
    'no_entropies',
    'old_labels',
    'one_vs_rest',
    'per_pixel_losses',
    'pooled_cube',
    'prototype_attraction',
    'prototype_matching',
    'repulsion',
    'selective_labels',
    'self_entropy',
    'sigmoid_cross_entropy',
    'sigmoid_distillation',
    'sigmoid_labels',
    'sparsity',
    'sum_over_ranks',
    'unbiased_cross_entropy',
    'unbiased_distillation',
]
