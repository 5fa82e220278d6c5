# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's training images together with what is replayed: exemplars and outside images."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmseg.registry import DATASETS
from torch.utils.data import Dataset

from mmseg_sats.datasets.memory.exemplars import read_exemplars
from mmseg_sats.utils.randomness import seeded

STAGE, MEMORY, OUTSIDE = 'stage', 'memory', 'outside'
"""Where a training image comes from: ``data_sample.source``; without it, it is the stage's own."""


def stage_dataset_cfg(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the stage's own images in that of a stage's training data."""
    return dataset.get('stage_images', dataset)


@DATASETS.register_module()
class ReplayDataset(Dataset):
    """The stage's images, followed by the exemplars and then the outside images.

    An image that is the stage's and an exemplar is in it twice: with the stage's labels (old classes
    are background, which a pseudo-labeler may complete) and with the true labels of all seen classes.

    Every data sample says in its metainfo ``source`` which it is.

    An index may be larger than the data set: ``index + n * len(dataset)`` is the same image, replayed
    after n earlier times. With a ``seed``, the random transforms of a replayed image only depend on
    (seed, stage, n, index), not on workers, and an exemplar that is replayed often within an epoch
    looks different each time.

    Args:
        stage_images: config of the stage's ``IncrementalDataset`` in training.
        exemplars: the ``exemplars.json`` of the stage before, or None.
        memory: the budget that the file must have been kept with.
        outside: config of an ``OutsideDataset``, or None.
        seed: of the random transforms of replayed images; None leaves them to the process's own
            generators.
        lazy_init: whether to leave reading lists and masks to :meth:`full_init`.

    Raises:
        ValueError: there is nothing to replay, or the memory has another budget or data set.
        FileNotFoundError: a list, a mask or the memory does not exist.

    Attributes:
        parts: the data sets by source.
    """

    def __init__(
        self,
        stage_images: Mapping[str, Any],
        exemplars: str | None = None,
        memory: int = 0,
        outside: Mapping[str, Any] | None = None,
        seed: int | None = None,
        lazy_init: bool = False,
    ) -> None:
        self.seed = seed
        cfgs = {STAGE: dict(stage_images, lazy_init=True)}
        if exemplars is not None:
            read_exemplars(exemplars, memory)
            cfgs[MEMORY] = dict(cfgs[STAGE], mode='memory', exemplars=exemplars)
        if outside is not None:
            cfgs[OUTSIDE] = dict(outside, lazy_init=True)
        if len(cfgs) == 1:
            raise ValueError('ReplayDataset needs exemplars or outside images, got neither')
        self.parts: dict[str, Dataset] = {
            source: DATASETS.build(cfg) for source, cfg in cfgs.items()
        }
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        """That of the stage's own data set."""
        return self.parts[STAGE].metainfo

    @property
    def whole(self) -> 'ReplayDataset':
        """Itself, also when asked through mmengine's slice of it (``num_batch_per_epoch``)."""
        return self

    @property
    def ranges(self) -> dict[str, range]:
        """The indices of each source's images."""
        start, ranges = 0, {}
        for source, part in self.parts.items():
            ranges[source] = range(start, start + len(part))
            start += len(part)
        return ranges

    def full_init(self) -> None:
        """Reads lists, masks and the memory. In a distributed run all ranks must do so."""
        for part in self.parts.values():
            part.full_init()

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the stage's images; replayed ones are told by their index."""
        stage_images = self.parts[STAGE]
        if hasattr(stage_images, 'set_epoch'):
            stage_images.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __iter__(self) -> Iterator[dict]:
        return (self[idx] for idx in range(len(self)))  # any index is valid, however large

    def __getitem__(self, idx: int) -> dict:
        """The image after its pipeline, its ``source`` noted."""
        if idx < 0:
            raise IndexError(f'{idx}: a ReplayDataset is indexed from 0')
        number, row = divmod(idx, len(self))
        source, at = next(
            (source, row - indices.start)
            for source, indices in self.ranges.items()
            if row in indices
        )
        data = self._draw(source, at, (number, row))
        data['data_samples'].set_metainfo(dict(source=source))
        return data

    def _draw(self, source: str, at: int, key: tuple[int, ...]) -> dict:
        part = self.parts[source]
        if source == STAGE:
            # An IncrementalDataset takes the number as that of the epoch, which it is.
            return part[at + key[0] * len(part)] if hasattr(part, 'set_epoch') else part[at]
        if self.seed is None:
            return part[at]
        with seeded(self.seed, self.metainfo['stage'], *key):
            return part[at]
