# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Bilinear resizing of a batch of logits a few rows at a time, and its adjoint.

``F.interpolate`` writes whole images. Here each axis is a small matrix, so that rows can be had from
those source rows alone that they need, and a gradient can be brought back likewise.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.models.attention import working_dtype

# How many entries of resized logits exist at a time, by device type: on a CPU what stays in its cache,
# on an accelerator few and large kernels. A block of rows shares what was done to its source rows.
PIECE_ELEMENTS = {'cpu': 2**20}
BLOCK_ELEMENTS = {'cpu': 2**22}
DEFAULT_ELEMENTS = 2**25


class ResizedLogits:
    """Logits (B, K, h, w), resized to (H, W) as ``F.interpolate(mode='bilinear')`` does, by rows.

    Where they are resized they must be finite: mask a class by a large negative number, not by -inf.

    Args:
        logits: at any resolution.
        size: (H, W).
        align_corners: as in ``F.interpolate``.
    """

    def __init__(self, logits: Tensor, size: Sequence[int], align_corners: bool) -> None:
        self.dtype = working_dtype(logits)
        self.size = (int(size[0]), int(size[1]))
        # (B, h, K, w): neighbouring rows are one matrix.
        self.images = logits.transpose(1, 2)
        self.down, self.across = (
            _weights(old, new, align_corners, self.dtype)
            for old, new in zip(logits.shape[2:], self.size, strict=True)
        )
        # Left as they are, since a product with 0 makes NaN of what is not finite.
        self.as_high, self.as_wide = (
            old == new for old, new in zip(logits.shape[2:], self.size, strict=True)
        )
        used = self.down != 0
        self.first = used.int().argmax(1).tolist()
        self.stop = (used.shape[1] - used.flip(1).int().argmax(1)).tolist()
        self.down, self.across = self.down.to(logits.device), self.across.to(logits.device)

    def blocks(self) -> Iterator[slice]:
        """Cuts the H rows into blocks."""
        yield from self._cut(slice(0, self.size[0]), BLOCK_ELEMENTS)

    def pieces(self, block: slice) -> Iterator[slice]:
        """Cuts a block into pieces."""
        yield from self._cut(block, PIECE_ELEMENTS)

    def near(self, rows: slice) -> slice:
        """The source rows that some rows of the image are made of."""
        return slice(self.first[rows.start], self.stop[rows.stop - 1])

    def block(self, image: int, rows: slice) -> 'Block':
        """A block of an image's rows."""
        near = self.near(rows)
        wide = self.images[image, near].to(self.dtype)
        if not self.as_wide:
            wide = wide @ self.across.mT
        return Block(self, image, near, wide)

    def zeros(self) -> Tensor:
        """(B, h, K, w), for a gradient."""
        return torch.zeros_like(
            self.images, dtype=self.dtype, memory_format=torch.contiguous_format
        )

    def _cut(self, rows: slice, elements: dict[str, int]) -> Iterator[slice]:
        limit = elements.get(self.images.device.type, DEFAULT_ELEMENTS)
        size = max(1, limit // max(1, self.images.shape[2] * self.size[1]))
        for start in range(rows.start, rows.stop, size):
            yield slice(start, min(start + size, rows.stop))


class Block:
    """Source rows that are resized along the width, from which some rows of the image are made.

    Args:
        logits: whose rows these are.
        image: its number in the batch.
        near: which source rows.
        wide: (n, K, W), these rows.
    """

    def __init__(self, logits: ResizedLogits, image: int, near: slice, wide: Tensor) -> None:
        self.logits, self.image, self.near = logits, image, near
        self.wide = wide
        self.grad: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """The image's rows, (n, K, W)."""
        down, own = self._sources(rows)
        if self.logits.as_high:
            return self.wide[own].clone()
        return (down @ self.wide[own].flatten(1)).unflatten(1, self.wide.shape[1:])

    def add_gradient(self, grad: Tensor, rows: slice) -> None:
        """Takes the gradient (n, K, W) of these rows."""
        if self.grad is None:
            self.grad = torch.zeros_like(self.wide)
        down, own = self._sources(rows)
        if self.logits.as_high:
            self.grad[own] += grad
        else:
            self.grad[own].flatten(1).addmm_(down.mT, grad.flatten(1))

    def _sources(self, rows: slice) -> tuple[Tensor, slice]:
        """What these rows take (n, m) of m of the block's source rows, and which those are."""
        near = self.logits.near(rows)
        own = slice(near.start - self.near.start, near.stop - self.near.start)
        return self.logits.down[rows, near], own

    def give_gradient(self, total: Tensor) -> None:
        """Adds to ``total``, of ``zeros()``, what all the rows' gradients are to the logits."""
        grad = self.grad if self.logits.as_wide else self.grad @ self.logits.across
        total[self.image, self.near] += grad


def _weights(source: int, size: int, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """(size, source): what each place of the resized axis takes of the source's, by torch's own rule."""
    axis = torch.eye(source, dtype=dtype)[None]
    return F.interpolate(axis, size, mode='linear', align_corners=align_corners)[0].mT.contiguous()
