# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Bilinear resizing of a batch of logits chunk by chunk, and its gradient.

A chunk consists of whole images, which ``F.interpolate`` resizes, or, if a single image is too large, of
some rows of an image. Rows are resized by multiplying with a small matrix per axis, so that only the
source rows that they depend on are needed. In both cases the gradient is computed with the transposed
matrices, which is deterministic; that of ``F.interpolate`` on a GPU is not.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.precision import working_dtype

# How many entries of resized logits are computed at a time, by device type. On a CPU, a chunk should fit into
# the cache; an accelerator needs few large kernels. A tile of rows has several chunks, which share the source
# rows that were already resized along the width.
CHUNK_ELEMENTS = {'cpu': 2**19}
TILE_ELEMENTS = {'cpu': 2**22}
DEFAULT_ELEMENTS = 2**24

# How many new positions of an axis are one matrix product. On a CPU, a product of the whole axis would mostly add
# zeros, since a position depends on two others; an accelerator needs few large kernels, and takes all at once.
AXIS_POSITIONS = {'cpu': 128}

TileIndex = tuple[slice | int, slice]
"""The place of a tile in labels (B, H, W): several whole images, or some rows of one image."""


def logits_for_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Resizes logits (B, K, h, w) bilinearly to the size of labels (B, H, W), with ``align_corners=False``.

    Raises:
        ValueError: if they do not have these shapes.
    """
    if logits.dim() != 4 or labels.dim() != 3 or len(labels) != len(logits):
        raise ValueError(f'teacher_logits must be (B, K_o, h, w) and labels (B, H, W), '
                         f'got {tuple(logits.shape)} and {tuple(labels.shape)}')
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=False)


class ResizedLogits:
    """Logits (B, K, h, w), resized to (H, W) as by ``F.interpolate(mode='bilinear')``, but in chunks.

    Logits that are resized must be finite: mask a class by a large negative number, not by -inf.

    Args:
        logits: (B, K, h, w), of any resolution.
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
        """Cuts a tile into chunks and yields the rows of each. A tile of whole images is one chunk."""
        images, rows = tile
        if isinstance(images, slice):
            yield rows
        else:
            yield from self._cut(rows, CHUNK_ELEMENTS)

    def tile(self, index: TileIndex) -> 'Tile':
        """The tile at an index from ``tiles()``, which may be that of other logits for the same images."""
        images, rows = index
        if isinstance(images, slice):
            return _ImageTile(self, images)
        return _RowTile(self, images, rows)

    def zeros(self) -> Tensor:
        """Zeros (B, K, h, w) for a gradient. In memory, neighbouring rows of an image form one matrix."""
        batch, channels, height, width = self.logits.shape
        zeros = self.logits.new_zeros(batch, height, channels, width, dtype=self.dtype)
        return zeros.transpose(1, 2)

    def _limit(self, elements: dict[str, int]) -> int:
        return elements.get(self.logits.device.type, DEFAULT_ELEMENTS)

    def _cut(self, rows: slice, elements: dict[str, int]) -> Iterator[slice]:
        most = max(1, self._limit(elements) // max(1, self.channels * self.size[1]))
        count = rows.stop - rows.start
        even = -(-count // -(-count // most)) if count else 1  # equal sizes, without a small rest at the end
        for start in range(rows.start, rows.stop, even):
            yield slice(start, min(start + even, rows.stop))


class Tile(ABC):
    """A part of the resized logits, which is computed chunk by chunk."""

    @abstractmethod
    def rows(self, rows: slice) -> Tensor:
        """Computes a chunk: (n, K, W), rows of one image, or (n, K, H * W), whole images."""

    @abstractmethod
    def add_gradient(self, grad: Tensor, rows: slice) -> None:
        """Takes the gradient of a chunk."""

    @abstractmethod
    def give_gradient(self, total: Tensor) -> None:
        """Adds the logits' gradient, from the gradients of all chunks, to ``total`` (from ``zeros()``)."""


class _ImageTile(Tile):
    """A tile of whole images, which is a single chunk.

    Args:
        logits: the logits of the batch.
        images: which of its images.
    """

    def __init__(self, logits: ResizedLogits, images: slice) -> None:
        self.logits, self.images = logits, images
        self.grad: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """Computes (n, K, H * W); ``rows`` must be all rows."""
        own = self.logits
        # Heads return channels-last logits, which a GPU resizes at half the speed of contiguous ones.
        small = own.logits[self.images].to(own.dtype).contiguous()
        if own.down.same and own.across.same:  # not resized, so they need not be finite
            return small.clone(memory_format=torch.contiguous_format).flatten(2)
        large = F.interpolate(small, own.size, mode='bilinear', align_corners=own.align_corners)
        return large.contiguous().flatten(2)

    def add_gradient(self, grad: Tensor, rows: slice) -> None:
        """Takes the gradient (n, K, H * W) of the chunk."""
        own = self.logits
        grad = grad.unflatten(2, own.size)
        grad = own.across.adjoint(grad)
        if not own.down.same:
            grad = own.down.weights.mT @ grad
        self.grad = grad

    def give_gradient(self, total: Tensor) -> None:
        """Adds the images' gradient to ``total``."""
        total[self.images].add_(self.grad)


class _RowTile(Tile):
    """A tile of some rows of an image. Their source rows are resized along the width once for all chunks.

    Args:
        logits: the logits of the batch.
        image: the image's index in the batch.
        rows: the tile's rows.
    """

    def __init__(self, logits: ResizedLogits, image: int, rows: slice) -> None:
        self.logits, self.image = logits, image
        self.near = logits.down.near(rows)
        # (h, K, w), so that neighbouring rows form one matrix.
        self.wide = logits.across.resize(logits.logits[image, :, self.near].transpose(0, 1).to(logits.dtype))
        self.grad: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """Computes some of the tile's rows, (n, K, W)."""
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
        """The weights (n, m) of these n rows on m of the tile's source rows, and the slice of those."""
        near = self.logits.down.near(rows)
        own = slice(near.start - self.near.start, near.stop - self.near.start)
        return self.logits.down.weights[rows, near], own

    def give_gradient(self, total: Tensor) -> None:
        """Adds the gradient of the tile's source rows to ``total``."""
        grad = self.logits.across.adjoint(self.grad)
        total[self.image, :, self.near].add_(grad.transpose(0, 1))


class _Axis(NamedTuple):
    """How an axis is resized.

    Args:
        weights: (size, source), the weight of each source position in each new position.
        same: whether the axis keeps its size. Then nothing is multiplied, because 0 times a value that
            is not finite is NaN.
        first: for each new position, the first source position with a weight.
        stop: for each new position, the source position after the last with a weight.
    """

    weights: Tensor
    same: bool
    first: list[int]
    stop: list[int]

    def near(self, places: slice) -> slice:
        """The source positions that a range of new positions depends on."""
        return slice(self.first[places.start], self.stop[places.stop - 1])

    def resize(self, values: Tensor) -> Tensor:
        """Resizes the last dimension: (..., source) to (..., size)."""
        if self.same:
            return values
        flat = values.reshape(-1, values.shape[-1])
        resized = flat.new_empty(len(flat), len(self.weights))
        for places, near in self._products():
            torch.mm(flat[:, near], self.weights[places, near].mT, out=resized[:, places])
        return resized.unflatten(0, values.shape[:-1])

    def adjoint(self, grad: Tensor) -> Tensor:
        """The gradient (..., source) of :meth:`resize` from that of its result, (..., size)."""
        if self.same:
            return grad
        flat = grad.reshape(-1, grad.shape[-1])
        total = flat.new_zeros(len(flat), self.weights.shape[1])
        for places, near in self._products():
            total[:, near].addmm_(flat[:, places], self.weights[places, near])
        return total.unflatten(0, grad.shape[:-1])

    def _products(self) -> Iterator[tuple[slice, slice]]:
        """The new positions of one product after the other, and the source positions that they depend on."""
        size = len(self.weights)
        step = AXIS_POSITIONS.get(self.weights.device.type, size)
        for start in range(0, size, step):
            places = slice(start, min(start + step, size))
            yield places, self.near(places)


# Cached: every training step needs the same few axes, and computing one would wait for the device.
@lru_cache(maxsize=32)
def _axis(
    source: int, size: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> _Axis:
    """The weights of ``F.interpolate``, found by resizing an identity matrix."""
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
    """Groups ascending numbers into slices of consecutive ones, none longer than ``longest``."""
    start = 0
    for stop in range(1, len(numbers) + 1):
        ends = stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1
        if ends or stop - start == longest:
            yield slice(numbers[start], numbers[stop - 1] + 1)
            start = stop
