# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's training images together with what is replayed: exemplars and outside images."""

from collections.abc import Mapping
from typing import Any

from mmseg.registry import DATASETS
from torch.utils.data import Dataset

from mmseg_sats.datasets.exemplars import read_exemplars

STAGE, MEMORY, OUTSIDE = 'stage', 'memory', 'outside'
"""Where a training image comes from: ``data_sample.source``; without it, it is the stage's own."""


def stage_dataset_cfg(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the stage's own images in that of a stage's training data."""
    return dataset.get('stage_images', dataset)


@DATASETS.register_module()
class ReplayDataset(Dataset):
    """The stage's images, then the exemplars, then the outside images, one behind the other.

    An image that is the stage's and an exemplar is in it twice: with the stage's labels (old classes
    are background, which a pseudo-labeler may complete) and with the true labels of all seen classes.

    Every data sample says in its metainfo ``source`` which it is.

    Args:
        stage_images: config of the stage's ``IncrementalDataset`` in training.
        exemplars: the ``exemplars.json`` of the stage before, or None.
        memory: the budget that the file must have been kept with.
        outside: config of an ``OutsideDataset``, or None.
        lazy_init: whether to leave reading lists and masks to :meth:`full_init`.

    Raises:
        ValueError: there is nothing to replay, or the memory is of another budget or data set.
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
        lazy_init: bool = False,
    ) -> None:
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

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __getitem__(self, idx: int) -> dict:
        """The idx-th image after its pipeline, its ``source`` noted."""
        for source, indices in self.ranges.items():
            if idx in indices:
                data = self.parts[source][idx - indices.start]
                data['data_samples'].set_metainfo(dict(source=source))
                return data
        raise IndexError(f'image {idx} of {len(self)}')
