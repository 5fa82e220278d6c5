# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""UCB's weights of pixels in the segmentation loss, as a part of a segmentor that counts a stage's pixels."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.over_ranks import sum_over_ranks
from mmseg_sats.functional.pseudo_labels.pixel_weights import (
    certainty_weights,
    class_balance_weights,
)
from mmseg_sats.functional.pseudo_labels.thresholds import find_rule
from mmseg_sats.models.segmentor_output import SegmentorOutput, labelling_chunks


@MODELS.register_module()
class UncertaintyBalanceWeights:
    """The product of :func:`certainty_weights` and :func:`class_balance_weights`, divided by its mean over the batch.

    The entropy is that of the old model's prediction; annotated pixels have entropy 0. The classes' pixels are
    counted in the completed labels, from the beginning of the stage on. Ignored pixels count in the mean, as they do
    in the mean of mmseg's cross-entropy. A loss that is a mean over labelled pixels alone (``OneVsRestLoss``, or
    ``avg_non_ignore=True``) is made smaller where these are less certain than the ignored ones.

    It is a plain object, so nothing of it enters a model's ``state_dict``. ``PixelWeightHook`` saves its counts for
    resuming.

    Args:
        num_channels: K, background included.
        limit: the entropy from which on a pixel does not count, in (0, 1].

    Raises:
        ValueError: ``limit`` is out of range.
    """

    hooks: ClassVar[tuple[dict[str, str], ...]] = (dict(type='PixelWeightHook'),)
    """Configs of the hooks that this class needs; a run adds them to its own."""

    def __init__(self, num_channels: int, limit: float = 0.5) -> None:
        if not 0 < limit <= 1:
            raise ValueError(f'UncertaintyBalanceWeights.limit must be in (0, 1], got {limit}')
        self.num_channels = num_channels
        self.limit = limit
        self.counts = torch.zeros(num_channels, dtype=torch.int64)
        """The foreground pixels of each class since the beginning of the stage; background's number is not used."""

    @torch.no_grad()
    def __call__(self, labels: Tensor, completed: Tensor, teacher: SegmentorOutput) -> Tensor:
        """Counts the pixels of a batch and returns their weights.

        Args:
            labels: (B, H, W) long, before they were completed.
            completed: (B, H, W) long, the completed labels.
            teacher: the old model's output.

        Returns:
            (B, H, W) float32, whose mean over all processes is 1 unless all are 0.
        """
        self._count(completed)
        entropies = torch.zeros(labels.shape, device=labels.device)
        entropy = find_rule('median').entropy
        for chunk, (logits,) in labelling_chunks(entropies, [teacher], range(len(labels))):
            chunk.copy_(entropy(logits.float()))
        entropies.masked_fill_((labels > 0) & (labels < self.num_channels), 0)
        factors = class_balance_weights(self.counts, teacher.logits.shape[1]).to(entropies)
        known = completed.masked_fill(completed >= self.num_channels, 0)
        weights = certainty_weights(entropies, self.limit) * factors[known]
        total = weights.sum(dtype=torch.float64)
        total, number = sum_over_ranks(torch.stack([total, torch.full_like(total, weights.numel())]))
        return weights * (number / total.clamp(min=1e-12)).float()

    def _count(self, labels: Tensor) -> None:
        known = labels.masked_fill(labels >= self.num_channels, 0)
        batch = torch.bincount(known.flatten(), minlength=self.num_channels)
        self.counts = self.counts.to(batch.device) + sum_over_ranks(batch)

    def state_dict(self) -> dict[str, Tensor]:
        """``counts`` (K,), int64, on the CPU."""
        return dict(counts=self.counts.cpu().clone())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the counts of :meth:`state_dict`.

        Raises:
            ValueError: they are of another number of classes.
        """
        if state['counts'].shape != self.counts.shape:
            raise ValueError(f'counts of {len(state["counts"])} classes do not fit {self.num_channels} classes')
        self.counts = state['counts'].clone()
