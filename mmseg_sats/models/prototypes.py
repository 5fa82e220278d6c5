# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Prototypes: the running mean of each class's features, over all pixels seen so far.

Michieli and Zanuttigh, "Continual Semantic Segmentation via Repulsion-Attraction of Sparse and
Disentangled Latent Representations", CVPR 2021 (SDR), section 4.1.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.prototypes import labels_on_grid, pixels_of


@MODELS.register_module()
class ClassPrototypes:
    """Mean features of the foreground classes, exact for any batch size and number of ranks.

    Background has no prototype, because in a stage's labels it also covers old and future classes.

    It is a plain object, so nothing of it enters a model's ``state_dict``. ``PrototypeHook`` saves it for
    the next stage and for resuming.

    Args:
        num_channels: K, background included.
        block: index of the encoder's block whose features are used; -1 is the last.
    """

    hooks = (dict(type='PrototypeHook'),)
    """Configs of the hooks that this class needs; a run adds them to its own."""

    def __init__(self, num_channels: int, block: int = -1) -> None:
        self.num_channels = num_channels
        self.block = block
        self._sums = torch.zeros(num_channels, 0, dtype=torch.float64)
        self._counts = torch.zeros(num_channels, dtype=torch.float64)

    @property
    def known(self) -> Tensor:
        """(K,) bool: whether at least one pixel of the class has been seen."""
        return self._counts > 0

    @property
    def means(self) -> Tensor:
        """(K, C) float32: the prototypes, 0 for classes that have none yet."""
        return (self._sums / self._counts.clamp(min=1)[:, None]).float()

    @torch.no_grad()
    def update(self, features: Sequence[Tensor], labels: Tensor) -> None:
        """Adds a batch: :meth:`sums_of`, summed over all ranks, then :meth:`add`. All ranks must call this."""
        batch = self.sums_of(features, labels)
        all_reduce(batch)
        self.add(batch)

    @torch.no_grad()
    def sums_of(self, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The sum of the features and the number of pixels of each class in a batch.

        Args:
            features: the encoder's feature maps (B, C_j, h_j, w_j).
            labels: (B, H, W) long; background and labels >= K (ignore) are left out.

        Returns:
            (K, C + 1) float64, with the number of pixels in the last column.
        """
        feature = features[self.block]
        labels = labels_on_grid(labels, feature.shape[2:])
        where = (labels > 0) & (labels < self.num_channels)
        one_hot = F.one_hot(labels[where], self.num_channels).double()
        # A matrix product in float64 is reproducible on a GPU too, and autocast leaves it in float64.
        sums = one_hot.T @ pixels_of(feature, where).double()
        return torch.cat([sums, one_hot.sum(0)[:, None]], 1)

    def add(self, sums: Tensor) -> None:
        """Adds the sums (K, C + 1) that :meth:`sums_of` returned."""
        self._sums, self._counts = self._sums.to(sums.device), self._counts.to(sums.device)
        if not self._sums.shape[1]:
            self._sums = torch.zeros_like(sums[:, :-1])
        self._sums += sums[:, :-1]
        self._counts += sums[:, -1]

    def state_dict(self) -> dict[str, Tensor]:
        """``sums`` (K, C) and ``counts`` (K,), float64, on the CPU."""
        return dict(sums=self._sums.cpu().clone(), counts=self._counts.cpu().clone())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the values of :meth:`state_dict`, of this stage or of an earlier one with fewer classes.

        Raises:
            ValueError: the values are for more classes than this object has.
        """
        sums, counts = state['sums'].double(), state['counts'].double()
        missing = self.num_channels - counts.shape[0]
        if missing < 0 or sums.shape[0] != counts.shape[0]:
            raise ValueError(
                f'prototypes of {sums.shape[0]} classes with {counts.shape[0]} counts do not fit '
                f'{self.num_channels} classes'
            )
        # Not F.pad, which up to torch 2.6 refuses sums without a column, that is before the first batch.
        self._sums = torch.cat([sums, sums.new_zeros(missing, sums.shape[1])])
        self._counts = torch.cat([counts, counts.new_zeros(missing)])
