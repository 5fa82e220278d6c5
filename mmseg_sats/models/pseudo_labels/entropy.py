# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""PLOP's pseudo-labels, as a pseudo-labeler of a segmentor that keeps the thresholds of a stage."""

from collections.abc import Mapping
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pseudo_labels.entropy import (
    confident_share,
    count_entropies,
    entropy_labels,
    entropy_thresholds,
    no_entropies,
)
from mmseg_sats.functional.pseudo_labels.thresholds import find_rule
from mmseg_sats.models.parts import PseudoLabeler


@MODELS.register_module()
class EntropyPseudoLabeler(PseudoLabeler):
    """Labels background pixels with the old model's class if its entropy is below a threshold.

    Let q be the old model's softmax at a pixel of label 0, c its argmax (which may be background), and
    u = -sum q log q / log K_o. The pixel's new label is c if u < threshold[c], else ``ignore_index``.
    Other labels stay. The threshold of a class is the median of u over the stage's background pixels
    where the class is predicted. Thresholds are computed in one pass before training: :meth:`reset`,
    :meth:`update` for every batch, :meth:`compute`.

    It is a plain object, so nothing of it enters a model's ``state_dict``. Its softmax is as large as the
    logits, so it should be called on chunks of a batch rather than the whole batch.

    Args:
        floor: smallest threshold of a class, and the threshold of a class without pixels.
        threshold: ``'median'``; ``'released'`` for the arithmetic of PLOP's released code, or a number in
            (0, 1], which is the threshold of all classes and needs no pass. In the released code,
            entropy is averaged over classes rather than summed, divided by log K_o twice, and the
            median's running sum adds bin numbers instead of counts (on ADE20K every pixel passes). Its
            second division is by the log of old and new channels together; here it is by that of the old
            model's channels, which changes the labels of a few pixels in a thousand.
        ignore_index: label of the background pixels that are not confident. With 0 they stay background, for a
            segmentation loss in which background stands for the old classes too, such as
            :class:`UnbiasedCrossEntropyLoss`: then they are only taught not to be new.
        scale_images: whether the cross-entropy of an image is scaled by the share of its background
            pixels that are confident, as in PLOP. SATS does not do this.

    Raises:
        ValueError: ``threshold`` is unknown, a number is out of range, or images are to be scaled with
            ``ignore_index=0``, which does not tell the confident pixels from the others.
    """

    pixelwise = True

    def __init__(
        self,
        floor: float = 0.001,
        threshold: str | float = 'median',
        ignore_index: int = 255,
        scale_images: bool = False,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f'floor must be in [0, 1], got {floor}')
        if scale_images and ignore_index == 0:
            raise ValueError(
                'EntropyPseudoLabeler: scale_images=True with ignore_index=0, which labels confident background and '
                'uncertain pixels alike; expected another ignore_index, such as 255'
            )
        self.floor = floor
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.scale_images = scale_images
        self.needs_pass = isinstance(threshold, str)
        """Whether thresholds must be computed (or loaded) before the first call."""
        find_rule(threshold)  # raises if it is unknown
        self._histograms: Tensor | None = None
        self._thresholds: Tensor | None = None

    def reset(self, num_old: int) -> None:
        """Starts a new pass, for an old model with ``num_old`` channels, background included."""
        self._histograms = no_entropies(num_old, self.threshold)
        self._thresholds = None

    @property
    def histograms(self) -> Tensor:
        """(K_o, bins) int64 counts of background pixels by predicted class and entropy in [0, 1].

        In a distributed run they must be summed over all ranks, in place, before :meth:`compute`.
        """
        if self._histograms is None:
            raise RuntimeError('EntropyPseudoLabeler has no histograms: call reset(num_old) first')
        return self._histograms

    @property
    def thresholds(self) -> Tensor | None:
        """(K_o,) float32, or None until computed, set or loaded."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, value: Tensor) -> None:
        if value.dim() != 1 or not value.is_floating_point() or bool(value.isnan().any()):
            raise ValueError(f'thresholds must be numbers of shape (K_o,), got {value.dtype} of '
                             f'{tuple(value.shape)}: {value.tolist()}')
        self._thresholds = value.detach().float()

    def update(self, labels: Tensor, teacher_logits: Tensor) -> None:
        """Counts the background pixels of a batch.

        Args:
            labels: (B, H, W) integers.
            teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.

        Raises:
            ValueError: the shapes disagree with each other or with ``num_old``.
            RuntimeError: :meth:`reset` was not called.
        """
        self._histograms = self.histograms.to(teacher_logits.device)
        count_entropies(self._histograms, labels, teacher_logits, self.threshold)

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Computes, sets and returns the thresholds (K_o,) from all pixels counted since :meth:`reset`."""
        # The pass is over, so the counts are moved to the CPU to free GPU memory for training.
        self._histograms = self.histograms.cpu()
        self.thresholds = entropy_thresholds(self._histograms, self.floor, self.threshold)
        return self._thresholds

    def __call__(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """Returns the completed labels.

        Args:
            labels: (B, H, W) integers; not modified.
            teacher_logits: (B, K_o, h, w), the old model's logits; resized if the labels have another size.

        Returns:
            A new tensor like ``labels``.

        Raises:
            RuntimeError: the thresholds have not been computed.
            ValueError: the shapes disagree with each other or with the thresholds.
        """
        if self._thresholds is None:
            self._start_without_pass(teacher_logits.shape[1])
        self._thresholds = self._thresholds.to(teacher_logits.device)
        return entropy_labels(
            labels, teacher_logits, self._thresholds, ignore_index=self.ignore_index, rule=self.threshold
        )

    def image_weights(self, labels: Tensor, completed: Tensor) -> Tensor | None:
        """The factor of each image's cross-entropy, (B,), or None if images are not scaled.

        Args:
            labels: (B, H, W), the argument of :meth:`__call__`.
            completed: (B, H, W), its result.
        """
        if not self.scale_images:
            return None
        return confident_share(labels, completed, self.ignore_index)

    def _start_without_pass(self, num_old: int) -> None:
        if self.needs_pass:
            raise RuntimeError(
                f'EntropyPseudoLabeler(threshold={self.threshold!r}) has no thresholds yet: '
                'a run finds them before a stage is trained, by PseudoLabelThresholdHook; elsewhere call '
                'reset, update and compute, or give a number as threshold')
        self.reset(num_old)
        self.compute()

    def state_dict(self) -> dict[str, Any]:
        """The rule and its thresholds as plain values, for a JSON file."""
        thresholds = None if self._thresholds is None else self._thresholds.tolist()
        return {'threshold': self.threshold, 'floor': self.floor, 'thresholds': thresholds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the thresholds of :meth:`state_dict`.

        Raises:
            KeyError: a key is missing.
            ValueError: the thresholds were computed with another rule or floor than this object's.
        """
        for name in ('threshold', 'floor'):
            if state[name] != getattr(self, name):
                raise ValueError(f'the stored thresholds were found with {name}={state[name]!r}, '
                                 f'expected {name}={getattr(self, name)!r}')
        if state['thresholds'] is None:
            self._thresholds = None
        else:
            self.thresholds = torch.tensor(state['thresholds'], dtype=torch.float32)
