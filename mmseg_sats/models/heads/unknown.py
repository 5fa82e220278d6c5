# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The scores of a model with SSUL's unknown class.

Cha et al., "SSUL: Semantic Segmentation with Unknown Label for Exemplar-based Class-Incremental
Learning", NeurIPS 2021, sections 3.2 and 3.3.
"""

import torch
from torch import Tensor


def fold_unknown(logits: Tensor) -> Tensor:
    """The scores of the classes, as in SSUL's evaluation.

    Args:
        logits: (B, K + 1, H, W), the unknown class last.

    Returns:
        (B, K, H, W): the sigmoid of each class; in channel 0, background's plus the unknown class's.
    """
    scores = logits.sigmoid()
    background = scores[:, :1] + scores[:, -1:]
    return torch.cat([background, scores[:, 1:-1]], dim=1)
