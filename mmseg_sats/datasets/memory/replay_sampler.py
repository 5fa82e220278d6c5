# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Batches of a stage's own and replayed images, on any number of processes."""

import math
from collections.abc import Iterator

import numpy as np
from mmseg.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from mmseg_sats.datasets.memory.replay import STAGE, ReplayDataset
from mmseg_sats.datasets.memory.shared_batches import SharedBatchSampler, endless_draw


def batch_split(batch_size: int, share: float, num_sources: int) -> tuple[int, ...]:
    """How many images of a batch come from the stage and from each source of replay.

    Args:
        batch_size: images in a batch.
        share: part of it for replay, rounded down, shared evenly by its sources (the first ones
            get what is left over).
        num_sources: number of sources of replay.

    Raises:
        ValueError: ``share`` outside (0, 1), or a batch too small to hold an image of each.
    """
    if isinstance(share, bool) or not isinstance(share, float | int) or not 0 < share < 1:
        raise ValueError(
            f'replay_share={share!r}: expected a part of the batch, in (0, 1), or None to mix '
            'replayed images in'
        )
    replay = int(batch_size * share)
    if replay < num_sources or replay == batch_size:
        raise ValueError(
            f'batch_size={batch_size} with replay_share={share} leaves {batch_size - replay} places '
            f"for the stage's images and {replay} for {num_sources} source(s) of replay; expected at "
            'least one for each'
        )
    parts = [replay // num_sources + (i < replay % num_sources) for i in range(num_sources)]
    return (batch_size - replay, *parts)


@DATA_SAMPLERS.register_module()
class ReplayBatchSampler(SharedBatchSampler):
    """Composes batches over a :class:`ReplayDataset`.

    With a ``share``, this part of each batch is replayed images, and an epoch has each of the stage's
    own images once, in the order they have without replay. Replayed images are taken from an endless
    sequence of shuffled passes that continues from epoch to epoch, so that all of them are used equally
    often. A smaller last batch keeps the proportions.

    With ``share=None`` an epoch is every image of every source once, shuffled.

    With ``endless`` the stage's own images (with ``share=None`` all) come as in
    :class:`SharedBatchSampler`: every batch is full.

    An index says how often its image was drawn before, see :class:`ReplayDataset`.

    Everything depends only on (seed, epoch) and the batch size of all processes together, so an epoch
    that is begun again after a resume has the same batches.

    Args:
        sampler: a sampler of mmengine over the data set, such as ``DefaultSampler``; its ``seed``,
            ``epoch`` and ``shuffle`` (of the stage's images) count.
        batch_size: images in a batch of this process.
        share: part of a batch for replay, or None.
        drop_last: leave out a last batch that is not full.
        endless: whether batches go on behind the last image of a pass.

    Raises:
        TypeError: the sampler or its data set is of another kind.
        ValueError: see :func:`batch_split`.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        share: float | None = 0.5,
        drop_last: bool = False,
        endless: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last, endless)
        whole = getattr(sampler.dataset, 'whole', None)
        if not isinstance(whole, ReplayDataset):
            raise TypeError(
                'ReplayBatchSampler expected an epoch-wise sampler such as DefaultSampler over a '
                f'ReplayDataset, got {type(sampler).__name__} over {type(sampler.dataset).__name__}'
            )
        self.total = len(whole)
        ranges = whole.ranges
        if share is None:
            self.split: tuple[int, ...] = (self.size,)
            self.ranges = [range(self.total)]
        else:
            batch_split(batch_size, share, len(ranges) - 1)  # of one process, as it was checked
            self.split = batch_split(self.size, share, len(ranges) - 1)
            self.ranges = [ranges.pop(STAGE), *ranges.values()]
        self.pool = self.count = len(self.ranges[0])
        if sampler.dataset is not whole:
            # mmengine's slice (num_batch_per_epoch) asks for so many batches; the stage's first
            # images are used, as they are without replay.
            batches = len(sampler.dataset) // self.size
            self.count = min(self.count, batches * self.split[0])
            self.pool = self.pool if share is None else self.count

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._number_of(self.split[0])

    def whole_batches(self) -> Iterator[list[int]]:
        """The batches of the epoch, each with the images of all processes."""
        own, *replayed = self._epoch()
        for number in range(len(self)):
            batch = own[number * self.split[0] : (number + 1) * self.split[0]]
            part = len(batch) / self.split[0]
            for rows, size in zip(replayed, self.split[1:], strict=True):
                batch = [*batch, *rows[number * size : number * size + math.ceil(part * size)]]
            yield batch

    def _epoch(self) -> list[list[int]]:
        """The indices of the epoch: the stage's own and, in turn, each replayed source's."""
        seed, epoch = self.sampler.seed, self.sampler.epoch
        if self.endless:
            rows = [self._pass_on(self.pool, len(self) * self.split[0], self.total)]
        else:
            rows = [[row + epoch * self.total for row in self._order(self.pool)[: self.count]]]
        for source, (size, indices) in enumerate(
            zip(self.split[1:], self.ranges[1:], strict=True)
        ):
            count = len(self) * size
            places = epoch * count + np.arange(count)
            draw = endless_draw(len(indices), int(places[0]), count, (seed, source))
            times = places // len(indices)
            rows.append((indices.start + draw + times * self.total).tolist())
        return rows
