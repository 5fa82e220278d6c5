# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Prototypes: what a model keeps of each class's features.

Michieli and Zanuttigh, "Continual Semantic Segmentation via Repulsion-Attraction of Sparse and
Disentangled Latent Representations", CVPR 2021 (SDR), section 4.1: the running mean over all pixels seen so far.
Chen et al., "Saving 100x Storage", NeurIPS 2023 (STAR): direction and norm of the features, at the end of a stage.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.functional.features.prototype_replay import FeatureStatistics, feature_sums
from mmseg_sats.functional.features.prototypes import labels_on_grid, pixels_of
from mmseg_sats.functional.pseudo_labels.old_model import fill_background, old_labels
from mmseg_sats.models.heads.linear_classifier import seen_classifier
from mmseg_sats.protocol import SETTINGS
from mmseg_sats.utils.spelling import check_choice


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

    grows_in_training: ClassVar[bool] = True
    """Whether every training step adds its batch; if False, ``PrototypeHook`` gathers them when a stage has ended."""

    names: ClassVar[tuple[str, ...]] = ('sums', 'counts')
    """The tensors of :meth:`state_dict`."""

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

    @staticmethod
    def features_of(model: nn.Module, inputs: Tensor) -> Sequence[Tensor]:
        """The features of images (B, 3, H, W) that :meth:`sums_of` expects."""
        return model.backbone(inputs)

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


@MODELS.register_module()
class ReplayPrototypes:
    """What STAR keeps of each class: the statistics of its features, from which features are drawn in later stages.

    The features are those before the decode head's classifier. They are gathered when a stage has ended, in one pass of
    the weights that are kept over the stage's training images, for the classes that it learned; those of older classes
    stay as they are. ``counts`` says how many positions of each class, background included, all stages so far showed.
    When a later stage begins, the old model's predictions say how many of these its images show again.

    It is a plain object, so nothing of it enters a model's ``state_dict``. ``PrototypeHook`` keeps it in a file.

    Args:
        num_channels: K, background included.
        setting: of the protocol. ``'overlapped'``: a stage's images may be those of earlier stages, so that what they
            show of old classes has been counted before. Otherwise they are others, and it is counted in addition.
    """

    hooks = (dict(type='PrototypeHook'),)
    """Configs of the hooks that this class needs; a run adds them to its own."""

    grows_in_training: ClassVar[bool] = False
    """See :class:`ClassPrototypes`."""

    names: ClassVar[tuple[str, ...]] = ('sums', 'counts', 'present')
    """The tensors of :meth:`state_dict`."""

    def __init__(self, num_channels: int, setting: str = 'overlapped') -> None:
        check_choice('ReplayPrototypes.setting', setting, SETTINGS)
        self.num_channels = num_channels
        self.overlapped = setting == 'overlapped'
        self._sums = torch.zeros(num_channels, 0, dtype=torch.float64)
        self.counts = torch.zeros(num_channels, dtype=torch.float64)
        # Positions of each class, and of all, in this stage's images; 0 until the old model has seen them.
        self.present = torch.zeros(num_channels + 1, dtype=torch.float64)

    @property
    def known(self) -> Tensor:
        """(K,) bool: the classes that have statistics, never background."""
        known = self._sums[:, -3] > 0 if self._sums.shape[1] else torch.zeros(self.num_channels, dtype=torch.bool)
        known[0] = False
        return known

    @property
    def statistics(self) -> FeatureStatistics:
        """Those of the known classes, in float64 on the CPU."""
        return FeatureStatistics.of_sums(self._sums[self.known])

    @property
    def shares(self) -> Tensor:
        """(N,): how many features of each known class a position of the batch stands for, 0 or more.

        A class is to be as frequent as in all stages so far. What the stage's images show of it is there already.
        """
        number, total = self.counts[self.known], self.present[-1].clamp(min=1)
        missing = number - self.present[:-1][self.known] if self.overlapped else number
        return missing.clamp(min=0) / total

    def background_share(self, num_new: int) -> float:
        """How much more each background position counts, so that background has the share of all stages so far.

        Args:
            num_new: the stage's new classes. In the overlapped setting each is taken to have been 1 % of the old
                background, and half of the present background to have been counted before, as in the released code.
        """
        now = float(self.present[0])
        share = self._old_background(num_new) / now if now else 0.0
        return max(share - 0.5, 0.0) if self.overlapped else share

    def _old_background(self, num_new: int) -> float:
        return float(self.counts[0]) * (1 - 0.01 * num_new if self.overlapped else 1)

    def update(self, features: Sequence[Tensor], labels: Tensor) -> None:
        """Does nothing: training steps add nothing."""

    @staticmethod
    def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
        """The features (B, C, h, w) before the classifier, for images (B, 3, H, W)."""
        with seen_classifier(model.decode_head) as seen:
            model.decode_head(model.extract_feat(inputs))
        return seen[-1].features

    def sums_of(self, features: Tensor, labels: Tensor) -> Tensor:
        """The sums (K, 2 C + 3) of a batch's features (B, C, h, w) by their labels (B, H, W)."""
        return feature_sums(features, labels_on_grid(labels, features.shape[2:]), self.num_channels)

    def present_in(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """The positions of each class and of all, (K + 1,), in a batch: labels (B, H, W), the old model's logits."""
        labels = completed_on_grid(labels, teacher_logits)
        numbers = torch.bincount(labels[labels < self.num_channels], minlength=self.num_channels).double()
        return torch.cat([numbers, numbers.new_tensor([labels.numel()])])

    def add(self, sums: Tensor) -> None:
        """Adds the stage's sums, for the classes that have none yet, and counts what the stage showed."""
        sums, old = sums.cpu(), self.known
        background = torch.arange(self.num_channels) == 0
        new, now = ~(old | background), self.present[:-1]
        if not old.any():
            counts = torch.where(background, sums[:, -3], 0)
        elif self.overlapped:
            # What the images show of the old classes was counted in their stages, and of background about half.
            counts = self.counts.clone()
            counts[0] = 0.5 * now[0] + self._old_background(int(new.sum()))
        else:
            counts = self.counts + now
        self.counts = torch.where(new, sums[:, -3], counts)
        # The row of background is not used.
        self._sums = torch.where(old[:, None], self._sums, sums) if old.any() else sums.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """``sums`` (K, 2 C + 3), ``counts`` (K,) and ``present`` (K + 1,), float64, on the CPU."""
        return dict(sums=self._sums.clone(), counts=self.counts.clone(), present=self.present.clone())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the values of :meth:`state_dict`, of this stage or of an earlier one with fewer classes.

        Raises:
            ValueError: the values are for more classes than this object has.
        """
        sums, counts, present = (state[name].double() for name in self.names)
        missing = self.num_channels - len(counts)
        if missing < 0 or len(sums) != len(counts) or len(present) != len(counts) + 1:
            raise ValueError(f'prototypes of {len(sums)} classes do not fit {self.num_channels} classes')
        self._sums = torch.cat([sums, sums.new_zeros(missing, sums.shape[1])])
        self.counts = torch.cat([counts, counts.new_zeros(missing)])
        # Of another stage's images: nothing is known of this stage's.
        self.present = present if not missing else present.new_zeros(self.num_channels + 1)


def completed_on_grid(labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """Labels (B, H, W) on the grid of the old model's logits (B, K_o, h, w), with its predictions for background."""
    small = labels_on_grid(labels, teacher_logits.shape[2:])
    return fill_background(small, old_labels(teacher_logits))
