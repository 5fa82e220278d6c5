# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""MBS's selective pseudo-labels: an unsure pixel stays background unless the old classes together outweigh it."""

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pseudo_labels.selective import selective_labels
from mmseg_sats.models.parts import PseudoLabeler


@MODELS.register_module()
class SelectivePseudoLabeler(PseudoLabeler):
    """Labels background pixels with a sure old class, and ignores only those that are likely an old class.

    See :func:`selective_labels`.

    Args:
        threshold: smallest probability of a pseudo-label, in (0, 1].
        ignore_index: label of the pixels that are ignored.

    Raises:
        ValueError: the threshold is out of range.
    """

    pixelwise = True

    def __init__(self, threshold: float = 0.7, ignore_index: int = 255) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f'threshold must be in (0, 1], got {threshold}')
        self.threshold = threshold
        self.ignore_index = ignore_index

    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """Returns the completed labels.

        Args:
            labels: (B, H, W) integers; not modified.
            teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.

        Returns:
            A new tensor like ``labels``.

        Raises:
            ValueError: the shapes disagree.
        """
        return selective_labels(labels, teacher_logits, self.threshold, self.ignore_index)
