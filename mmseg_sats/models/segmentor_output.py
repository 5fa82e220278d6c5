# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The output of a segmentor for a batch, which the losses and pseudo-labelers get."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.functional.precision import full_precision
from mmseg_sats.functional.resizing import ResizedLogits
from mmseg_sats.models.heads.linear_classifier import LinearClassifier
from mmseg_sats.models.prototypes import ClassPrototypes, ReplayPrototypes


class _NotAskedFor(tuple):
    """Stands for attention maps that no part requested. Unlike an empty tuple, it raises an error when it is read."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(
            'no attention maps were asked for: a part that reads `attentions` needs the class attribute '
            '`needs_attention = True` (DistillationPart in mmseg_sats.models.parts lists all of them)'
        )

    __iter__ = __len__ = __getitem__ = _refuse


NOT_ASKED_FOR = _NotAskedFor()


@dataclass(eq=False)
class SegmentorOutput:
    """The output of one model, the student or the old model, for a batch of B images.

    Args:
        logits: (B, K, h, w) at the head's resolution, K the model's channels, background included.
        features: one (B, C_j, h_j, w_j) per block of the backbone.
        attentions: one map per block, empty if the backbone has none. If no part of the segmentor
            requested them, reading them raises RuntimeError.
        align_corners: how the head's logits are resized.
        unknown: (B, 1, h, w), logits of the unknown class, or None if the model has none.
        prototypes: the classes' mean features or statistics, or None if the model does not compute them.
        future: (B, F, h, w), logits of the rows that wait for classes of later stages, or None if there are none.
        earlier: of an old model's output, those of the models of all stages before it, the first stage's first. Empty
            if no part requested them.
        more: what the head returns beside the logits for its own losses, e.g. the logits of a second classifier.
        last_layer: the head's classifier and its input, or None if no part requested it; see ``classifier``.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    attentions: tuple[BaseAttentionMap, ...] = ()
    align_corners: bool = False
    unknown: Tensor | None = None
    prototypes: ClassPrototypes | ReplayPrototypes | None = None
    future: Tensor | None = None
    more: tuple[Tensor, ...] = ()
    earlier: 'tuple[SegmentorOutput, ...]' = ()
    last_layer: LinearClassifier | None = None
    _resized: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def classifier(self) -> LinearClassifier:
        """The head's classifier and the features that it gets.

        Raises:
            RuntimeError: no part of the segmentor requested it.
        """
        if self.last_layer is None:
            raise RuntimeError(
                'the classifier was not asked for: a part that reads `classifier` needs the class attribute '
                '`needs_classifier = True` (DistillationPart in mmseg_sats.models.parts lists all of them)'
            )
        return self.last_layer

    @property
    def trained_logits(self) -> Tensor:
        """All logits that the segmentation loss gets: (B, K, h, w), and behind them the unknown or future classes."""
        beside = [logits for logits in (self.unknown, self.future) if logits is not None]
        return torch.cat([self.logits, *beside], 1) if beside else self.logits

    @property
    def head_output(self) -> Tensor | tuple[Tensor, ...]:
        """What the head returned, which its own losses expect."""
        return (self.trained_logits, *self.more) if self.more else self.trained_logits

    def equals(self, other: 'SegmentorOutput') -> bool:
        """Whether all tensors are exactly those of another output, of the same dtype; prototypes are not compared."""
        pairs = zip(self._compared(), other._compared(), strict=True)
        return all(own.dtype == its.dtype and torch.equal(own, its) for own, its in pairs)

    def _compared(self) -> Iterator[Tensor]:
        yield self.trained_logits
        yield from self.more
        yield from self.features
        if self.last_layer is not None:
            yield self.last_layer.features
        for attention in () if self.attentions is NOT_ASKED_FOR else self.attentions:
            yield from attention.tensors

    def labelling_logits(self, size: tuple[int, int]) -> Tensor:
        """Logits (B, K, H, W) at ``size`` for pseudo-labels.

        An unknown pixel counts as background: channel 0 is the larger of the logits of background and
        the unknown class.
        """
        logits = self.resized(size)
        if self.unknown is None:
            return logits
        unknown = F.interpolate(
            self.unknown, logits.shape[2:], mode='bilinear', align_corners=self.align_corners
        )
        return _with_unknown(torch.cat([logits, unknown], 1))

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Logits resized bilinearly to ``size`` (H, W): (B, K, H, W), computed once per size.

        Logits that already have this size are returned unchanged.
        """
        size = (int(size[0]), int(size[1]))
        if tuple(self.logits.shape[2:]) == size:
            return self.logits
        # A tensor computed without gradients must not be returned to a loss that needs them.
        key = (size, torch.is_grad_enabled())
        if key not in self._resized:
            self._resized[key] = F.interpolate(
                self.logits, size, mode='bilinear', align_corners=self.align_corners
            )
        return self._resized[key]


def labelling_chunks(
    labels: Tensor, outputs: Sequence[SegmentorOutput], images: Iterable[int]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yields the labels and the models' ``labelling_logits`` chunk by chunk, without gradients.

    Args:
        labels: (B, H, W).
        outputs: the outputs of the models for the same B images.
        images: the indices of the images to use, in ascending order.

    Yields:
        Views of the labels, and each model's logits: (n, H, W) and (n, K, H, W) for n whole images, or
        (n, 1, W) and (n, K, 1, W) for n rows of an image.
    """
    size = labels.shape[1:]
    logits = [
        ResizedLogits(replace(output, future=None).trained_logits.detach(), size, output.align_corners)
        for output in outputs
    ]
    largest = max(logits, key=lambda own: own.channels)
    for index in largest.tiles(images):
        with full_precision(labels):
            tiles = [own.tile(index) for own in logits]
        for rows in largest.chunks(index):
            chunk = labels[index[0], rows]
            if chunk.dim() == 2:
                chunk = chunk.unsqueeze(1)
            with full_precision(labels):
                values = [tile.rows(rows).unflatten(2, chunk.shape[1:]) for tile in tiles]
            yield (
                chunk,
                [
                    value if output.unknown is None else _with_unknown(value)
                    for value, output in zip(values, outputs, strict=True)
                ],
            )


def _with_unknown(logits: Tensor) -> Tensor:
    """Merges the unknown class, which is last, into background: from (B, K + 1, ...) to (B, K, ...)."""
    return torch.cat([torch.maximum(logits[:, :1], logits[:, -1:]), logits[:, 1:-1]], dim=1)
