# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Bilinear resizing of a batch of logits a chunk at a time, and its adjoint.

A chunk is some whole images, which ``F.interpolate`` resizes, or, where one image is too large for a
chunk, some of its rows. Each axis is a small matrix then, so that rows can be had from those source
rows alone that they need. The gradient goes through the transposes of these matrices in both cases:
it comes out the same every time, where that of ``F.interpolate`` on a GPU does not.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.models.precision import working_dtype

# How many entries of resized logits exist at a time, by device type: on a CPU what stays in its cache,
# on an accelerator few and large kernels. A tile of rows shares what was done to its source rows.
CHUNK_ELEMENTS = {'cpu': 2**19}
TILE_ELEMENTS = {'cpu': 2**22}
DEFAULT_ELEMENTS = 2**24

TileIndex = tuple[slice | int, slice]
"""Where a tile lies in labels (B, H, W): several whole images, or some rows of one."""


def logits_for_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Logits (B, K, h, w) at the size of labels (B, H, W), bilinearly, corners not aligned.

    Raises:
        ValueError: if they are not of these shapes.
    """
    if logits.dim() != 4 or labels.dim() != 3 or len(labels) != len(logits):
        raise ValueError(f'teacher_logits must be (B, K_o, h, w) and labels (B, H, W), '
                         f'got {tuple(logits.shape)} and {tuple(labels.shape)}')
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=False)


class ResizedLogits:
    """Logits (B, K, h, w), resized to (H, W) as ``F.interpolate(mode='bilinear')`` does, by chunks.

    Where they are resized they must be finite: mask a class by a large negative number, not by -inf.

    Args:
        logits: at any resolution.
        size: (H, W).
        align_corners: as in ``F.interpolate``.
    """

    def __init__(self, logits: Tensor, size: Sequence[int], align_corners: bool) -> None:
        self.dtype = working_dtype(logits)
        self.size = (int(size[0]), int(size[1]))
        self.logits = logits
        self.align_corners = align_corners
        self.down, self.across = (
            _axis(old, new, align_corners, self.dtype, logits.device)
            for old, new in zip(logits.shape[2:], self.size, strict=True)
        )

    @property
    def channels(self) -> int:
        """K."""
        return self.logits.shape[1]

    def tiles(self, images: Iterable[int] | None = None) -> Iterator[TileIndex]:
        """Cuts the batch, or some of its images, into tiles."""
        numbers = list(range(len(self.logits)) if images is None else images)
        together = self._limit(CHUNK_ELEMENTS) // max(1, self.channels * self.size[0] * self.size[1])
        if together:
            everything = slice(0, self.size[0])
            yield from ((run, everything) for run in _consecutive(numbers, together))
        else:
            for image in numbers:
                for rows in self._cut(slice(0, self.size[0]), TILE_ELEMENTS):
                    yield image, rows

    def chunks(self, tile: TileIndex) -> Iterator[slice]:
        """Cuts a tile into chunks, given by their rows; whole images are a chunk."""
        images, rows = tile
        if isinstance(images, slice):
            yield rows
        else:
            yield from self._cut(rows, CHUNK_ELEMENTS)

    def tile(self, index: TileIndex) -> 'Tile':
        """A tile of ``tiles()``, also of those of other logits for the same images."""
        images, rows = index
        if isinstance(images, slice):
            return _ImageTile(self, images)
        return _RowTile(self, images, rows)

    def zeros(self) -> Tensor:
        """(B, K, h, w), for a gradient; neighbouring rows of an image are one matrix."""
        batch, channels, height, width = self.logits.shape
        zeros = self.logits.new_zeros(batch, height, channels, width, dtype=self.dtype)
        return zeros.transpose(1, 2)

    def _limit(self, elements: dict[str, int]) -> int:
        return elements.get(self.logits.device.type, DEFAULT_ELEMENTS)

    def _cut(self, rows: slice, elements: dict[str, int]) -> Iterator[slice]:
        most = max(1, self._limit(elements) // max(1, self.channels * self.size[1]))
        count = rows.stop - rows.start
        even = -(-count // -(-count // most)) if count else 1  # no small rest at the end
        for start in range(rows.start, rows.stop, even):
            yield slice(start, min(start + even, rows.stop))


class Tile(ABC):
    """Part of the resized logits, from which chunks are made."""

    @abstractmethod
    def rows(self, rows: slice) -> Tensor:
        """A chunk: (n, K, W), rows of one image, or (n, K, H * W), whole images."""

    @abstractmethod
    def add_gradient(self, grad: Tensor, rows: slice) -> None:
        """Takes the gradient of a chunk."""

    @abstractmethod
    def give_gradient(self, total: Tensor) -> None:
        """Adds to ``total``, of ``zeros()``, what all the chunks' gradients are to the logits."""


class _ImageTile(Tile):
    """Whole images, a single chunk.

    Args:
        logits: whose images these are.
        images: which of them.
    """

    def __init__(self, logits: ResizedLogits, images: slice) -> None:
        self.logits, self.images = logits, images
        self.grad: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """(n, K, H * W); ``rows`` are all there are."""
        own = self.logits
        # Contiguous: of channels-last logits, as heads give them, a GPU makes images at half the speed.
        small = own.logits[self.images].to(own.dtype).contiguous()
        if own.down.same and own.across.same:  # left as they are, whatever they hold
            return small.clone(memory_format=torch.contiguous_format).flatten(2)
        large = F.interpolate(small, own.size, mode='bilinear', align_corners=own.align_corners)
        return large.contiguous().flatten(2)

    def add_gradient(self, grad: Tensor, rows: slice) -> None:
        """Takes the gradient (n, K, H * W) of the chunk."""
        own = self.logits
        grad = grad.unflatten(2, own.size)
        if not own.across.same:
            grad = grad @ own.across.weights
        if not own.down.same:
            grad = own.down.weights.mT @ grad
        self.grad = grad

    def give_gradient(self, total: Tensor) -> None:
        """Writes the logits' gradient."""
        total[self.images].add_(self.grad)


class _RowTile(Tile):
    """Source rows of an image, resized along the width, from which some of its rows are made.

    Args:
        logits: whose rows these are.
        image: its number in the batch.
        rows: the rows that will be asked for.
    """

    def __init__(self, logits: ResizedLogits, image: int, rows: slice) -> None:
        self.logits, self.image = logits, image
        self.near = logits.down.near(rows)
        # (h, K, w): neighbouring rows are one matrix.
        self.wide = logits.logits[image, :, self.near].transpose(0, 1).to(logits.dtype)
        if not logits.across.same:
            self.wide = self.wide @ logits.across.weights.mT
        self.grad: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """The image's rows, (n, K, W)."""
        down, own = self._sources(rows)
        if self.logits.down.same:
            return self.wide[own].clone()
        return (down @ self.wide[own].flatten(1)).unflatten(1, self.wide.shape[1:])

    def add_gradient(self, grad: Tensor, rows: slice) -> None:
        """Takes the gradient (n, K, W) of these rows."""
        if self.grad is None:
            self.grad = torch.zeros_like(self.wide, memory_format=torch.contiguous_format)
        down, own = self._sources(rows)
        if self.logits.down.same:
            self.grad[own].add_(grad)
        else:
            self.grad[own].flatten(1).addmm_(down.mT, grad.flatten(1))

    def _sources(self, rows: slice) -> tuple[Tensor, slice]:
        """What these rows take (n, m) of m of the tile's source rows, and which those are."""
        near = self.logits.down.near(rows)
        own = slice(near.start - self.near.start, near.stop - self.near.start)
        return self.logits.down.weights[rows, near], own

    def give_gradient(self, total: Tensor) -> None:
        """Adds what the tile's rows are to the image's gradient."""
        across = self.logits.across
        grad = self.grad if across.same else self.grad @ across.weights
        total[self.image, :, self.near].add_(grad.transpose(0, 1))


class _Axis(NamedTuple):
    """How an axis is resized.

    Args:
        weights: (size, source), what each place takes of the source's.
        same: whether the axis stays as it is; nothing is multiplied then, since a product with 0
            makes NaN of what is not finite.
        first: the first source place that each place takes anything of.
        stop: the one behind the last.
    """

    weights: Tensor
    same: bool
    first: list[int]
    stop: list[int]

    def near(self, places: slice) -> slice:
        """The source places that some neighbouring places are made of."""
        return slice(self.first[places.start], self.stop[places.stop - 1])


# A training asks for the same few axes in every step; making one anew would wait for the device.
@lru_cache(maxsize=32)
def _axis(
    source: int, size: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> _Axis:
    """By torch's own rule."""
    with torch.inference_mode(False):
        unit = torch.eye(source, dtype=dtype)[None]
        weights = F.interpolate(unit, size, mode='linear', align_corners=align_corners)[0].mT
        used = weights != 0
        return _Axis(
            weights.contiguous().to(device),
            source == size,
            used.int().argmax(1).tolist(),
            (source - used.flip(1).int().argmax(1)).tolist(),
        )


def _consecutive(numbers: Sequence[int], longest: int) -> Iterator[slice]:
    """Ascending numbers as slices of neighbours, none longer than ``longest``."""
    start = 0
    for stop in range(1, len(numbers) + 1):
        ends = stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1
        if ends or stop - start == longest:
            yield slice(numbers[start], numbers[stop - 1] + 1)
            start = stop
