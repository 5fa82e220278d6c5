# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Gives several processes the batches of one process, each divided between them."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmseg.registry import DATA_SAMPLERS
from torch.utils.data import Sampler


def share_of(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """A process's part of a batch: sizes differ by one at most, and none is empty.

    Args:
        batch: indices of the whole batch, at least one.
        rank: which process.
        world_size: how many processes there are. If there are more processes than images, those
            without an image get one that another process also has.
    """
    return list(batch[rank::world_size]) or [batch[rank % len(batch)]]


def endless_draw(size: int, start: int, count: int, key: Sequence[int]) -> np.ndarray:
    """Places ``start`` to ``start + count - 1`` of an endless sequence of shuffled passes over ``size`` items.

    Args:
        size: number of items.
        start: first place.
        count: number of places.
        key: what the shuffling depends on, besides the number of the pass.

    Returns:
        (count,) int64 items; every item comes up once in each pass.
    """
    passes = range(start // size, (start + count - 1) // size + 1)
    row = [np.random.default_rng([*key, number]).permutation(size) for number in passes]
    first = start - passes.start * size
    return np.concatenate(row)[first : first + count]


@DATA_SAMPLERS.register_module()
class SharedBatchSampler(Sampler):
    """Gives each process its share of the batches that one process would have.

    mmengine's samplers repeat images until all processes have equally many in an epoch, and cut
    batches afterwards. Here ``world_size`` processes with batches of b see, iteration by iteration,
    the images that one process with batches of ``world_size * b`` sees, each once; the last batch of
    an epoch may be divided unevenly.

    With ``endless`` the batches are those of mmengine's ``InfiniteSampler``: all are full, cut from an
    endless sequence of shuffled passes over the images, of which an epoch is the next part that has at
    least as many places as there are images. An index says in which pass its image is drawn, see
    :class:`IncrementalDataset`; other data sets get the bare index.

    Args:
        sampler: an epoch-wise sampler of mmengine, such as ``DefaultSampler``; its ``dataset``,
            ``seed``, ``epoch`` and ``shuffle`` count.
        batch_size: images in a batch of this process.
        drop_last: leave out a last batch that is not full.
        endless: whether batches go on behind the last image of a pass.

    Raises:
        TypeError: the sampler is of another kind.

    Attributes:
        size: images in a batch of all processes together.
    """

    def __init__(
        self, sampler: Sampler, batch_size: int, drop_last: bool = False, endless: bool = False
    ) -> None:
        if not hasattr(sampler, 'epoch'):
            raise TypeError(
                f'{type(self).__name__} expected an epoch-wise sampler such as DefaultSampler, '
                f'got {type(sampler).__name__}'
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last and not endless
        self.endless = endless
        self.rank, self.world_size = get_dist_info()
        self.size = batch_size * self.world_size
        self.count = len(sampler.dataset)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._number_of(self.size)

    def __iter__(self) -> Iterator[list[int]]:
        return (share_of(batch, self.rank, self.world_size) for batch in self.whole_batches())

    def whole_batches(self) -> Iterator[list[int]]:
        """The batches of the epoch, each with the images of all processes."""
        if self.endless:
            order = self._pass_on(self.count, len(self) * self.size, self._whole_length())
        else:
            order = self._order(self.count)
        for start in range(0, len(self) * self.size, self.size):
            yield order[start : start + self.size]

    def _number_of(self, own: int) -> int:
        """Batches of which each takes ``own`` of the ``count`` images of an epoch."""
        return self.count // own if self.drop_last else math.ceil(self.count / own)

    def _order(self, count: int) -> list[int]:
        """0 to ``count - 1`` in the order of the epoch, which is DefaultSampler's in one process."""
        if not getattr(self.sampler, 'shuffle', True):
            return list(range(count))
        generator = torch.Generator().manual_seed(self.sampler.seed + self.sampler.epoch)
        return torch.randperm(count, generator=generator).tolist()

    def _pass_on(self, pool: int, count: int, length: int) -> list[int]:
        """The epoch's part of the endless sequence.

        Args:
            pool: how many images it goes through.
            count: how many places an epoch has.
            length: what is added to the index of an image for each pass.
        """
        start = self.sampler.epoch * count
        places = start + np.arange(count)
        rows = places % pool
        if getattr(self.sampler, 'shuffle', True):
            rows = endless_draw(pool, start, count, (self.sampler.seed,))
        return (rows + places // pool * length).tolist()

    def _whole_length(self) -> int:
        """Length of the data set, or 0 if an index cannot say the pass."""
        # mmengine's slice for num_batch_per_epoch hands an index to the data set in it.
        dataset = getattr(self.sampler.dataset, '__dict__', {}).get('_dataset', self.sampler.dataset)
        return len(dataset) if hasattr(dataset, 'set_epoch') else 0
