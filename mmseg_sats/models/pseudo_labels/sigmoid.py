# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SSUL's pseudo-labels: the old model's class where its sigmoid is at least a threshold."""

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pseudo_labels.sigmoid import sigmoid_labels
from mmseg_sats.models.parts import PseudoLabeler


@MODELS.register_module()
class SigmoidPseudoLabeler(PseudoLabeler):
    """Labels background pixels with the old model's best class if its score is at least a threshold.

    See :func:`sigmoid_labels`.

    Args:
        threshold: smallest score, in (0, 1].

    Raises:
        ValueError: the threshold is out of range.
    """

    pixelwise = True

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f'threshold must be in (0, 1], got {threshold}')
        self.threshold = threshold

    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """Returns the completed labels.

        Args:
            labels: (B, H, W) long; not modified.
            teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.

        Returns:
            A new tensor like ``labels``.

        Raises:
            ValueError: the shapes disagree.
        """
        return sigmoid_labels(labels, teacher_logits, self.threshold)
