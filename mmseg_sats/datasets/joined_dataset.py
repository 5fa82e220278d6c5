# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Several mmseg datasets as one: what mmengine's ``ConcatDataset`` and ``RepeatDataset`` hold."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmseg.registry import DATASETS


class JoinedDataset:
    """The images of several datasets in turn, each once.

    ``IncrementalDataset`` wraps it in the place of mmengine's wrappers, which do not say where an image and its
    mask are. It has those attributes of a ``BaseSegDataset`` that are used there.

    Args:
        parts: the datasets, of the same classes.
        times: how often an epoch has the images of each.

    Raises:
        ValueError: the parts have different classes, or numbers in their masks.

    Attributes:
        data_prefix: ``img_path``, the deepest folder that holds the images of all parts.
    """

    data_root = None
    ann_file = ''

    def __init__(self, parts: Sequence[BaseDataset], times: Sequence[int]) -> None:
        self.parts, self.times = list(parts), list(times)
        first = self.parts[0]
        self.label_ids = getattr(first, 'label_ids', None)
        for number, part in enumerate(self.parts):
            for what, found, expected in (
                ('classes', part.metainfo.get('classes'), first.metainfo.get('classes')),
                ('numbers in its masks', getattr(part, 'label_ids', None), self.label_ids),
                *(
                    (name, getattr(part, name, None), getattr(first, name, None))
                    for name in ('label_map', 'reduce_zero_label')
                ),
            ):
                if found != expected:
                    raise ValueError(
                        f'ConcatDataset: part {number} ({type(part).__name__}) has the {what} {found}: expected '
                        f'those of part 0, {expected}'
                    )
        self.label_map = getattr(first, 'label_map', None)
        self.reduce_zero_label = getattr(first, 'reduce_zero_label', False)
        self.max_refetch = first.max_refetch
        self.pipeline = first.pipeline
        folders = [os.path.abspath(part.data_prefix.get('img_path') or '.') for part in self.parts]
        self.data_prefix = dict(img_path=os.path.commonpath(folders))

    @property
    def metainfo(self) -> dict:
        """That of the first part."""
        return self.parts[0].metainfo

    @property
    def repeats(self) -> np.ndarray:
        """(len,) int64: how often an epoch has each image."""
        return np.repeat(np.array(self.times, np.int64), [len(part) for part in self.parts])

    def full_init(self) -> None:
        """Reads the lists of all parts."""
        for part in self.parts:
            part.full_init()

    def load_data_list(self) -> list[dict]:
        """The entries of all parts."""
        return [info for part in self.parts for info in part.load_data_list()]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def get_data_info(self, idx: int) -> dict:
        """The entry of the idx-th image."""
        idx = idx + len(self) if idx < 0 else idx
        for part in self.parts:
            if idx < len(part):
                return part.get_data_info(idx)
            idx -= len(part)
        raise IndexError(f'there are {len(self)} images')


def parts_of(dataset: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """The datasets inside mmengine's wrappers, as configs or instances, and how often each is repeated.

    Args:
        dataset: a config or an instance; one of another kind is its own only part.
        times: how often it is repeated itself.
    """
    if isinstance(dataset, Mapping):
        kind = dataset.get('type')
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        inner = dataset
    else:
        kind, inner = type(dataset), vars(dataset)
    if isinstance(kind, type) and issubclass(kind, ConcatDataset):
        for part in inner['datasets']:
            yield from parts_of(part, times)
    elif isinstance(kind, type) and issubclass(kind, RepeatDataset):
        yield from parts_of(inner['dataset'], times * inner['times'])
    else:
        yield dataset, times


def pipeline_of(dataset: Mapping[str, Any]) -> Any:
    """The transforms in a dataset's config, of the first part where it wraps several; None without any."""
    first, _ = next(parts_of(dataset))
    return first.get('pipeline')
