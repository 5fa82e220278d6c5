# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Batches without end: all are full, images come equally often, and an epoch of them can be had again."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS, TRANSFORMS

from mmseg_sats.datasets import ReplayBatchSampler, ReplayDataset, SharedBatchSampler
from mmseg_sats.datasets.memory import shared_batches


class Numbered:
    """A data set whose index says the pass too."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        raise NotImplementedError


class Sources(ReplayDataset):
    """Sources of any size, without files."""

    def __init__(self, **sizes: int) -> None:
        self.parts = {source: range(size) for source, size in sizes.items()}


def epochs_of(kind: type, dataset: Any, batch_size: int, count: int, shuffle: bool = True, **options: Any) -> list:
    """The batches of so many epochs."""
    sampler = DefaultSampler(dataset, shuffle=shuffle, seed=5)
    batches = kind(sampler, batch_size, endless=True, **options)
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
        assert found[-1] == list(batches)
    return found


@pytest.mark.parametrize('images', [3, 8, 10, 25])
def test_batches_go_on_behind_the_last_image(images: int) -> None:
    epochs = epochs_of(SharedBatchSampler, Numbered(images), 8, 20)
    assert len(epochs[0]) == -(-images // 8)
    flat = [index for epoch in epochs for batch in epoch for index in batch]
    assert {len(batch) for epoch in epochs for batch in epoch} == {8}
    # Each pass has every image once, and no pass has the order of the one before.
    passes = [flat[start : start + images] for start in range(0, len(flat) - images + 1, images)]
    for number, indices in enumerate(passes):
        assert sorted(index - number * images for index in indices) == list(range(images))
    orders = {tuple(index % images for index in indices) for indices in passes}
    assert len(orders) > min(len(passes), 6) / 2
    if images == 25:
        assert len(orders) == len(passes)


def test_an_order_that_is_not_shuffled_goes_on_too() -> None:
    epochs = epochs_of(SharedBatchSampler, Numbered(3), 2, 2, shuffle=False)
    assert epochs == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]  # 3 is the first image, the second time
    # Another data set knows no passes.
    assert epochs_of(SharedBatchSampler, range(3), 2, 2, shuffle=False) == [[[0, 1], [2, 0]], [[1, 2], [0, 1]]]


def test_processes_share_endless_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = epochs_of(SharedBatchSampler, Numbered(7), 4, 3)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(shared_batches, 'get_dist_info', lambda rank=rank: (rank, 2))
        parts.append(epochs_of(SharedBatchSampler, Numbered(7), 2, 3))
    for epoch, *shares in zip(alone, *parts, strict=True):
        for whole, *one in zip(epoch, *shares, strict=True):
            assert sorted(index for part in one for index in part) == sorted(whole)


@pytest.mark.parametrize('share', [0.5, None])
def test_with_replay(share: float | None) -> None:
    dataset = Sources(stage=5, memory=3)
    epochs = epochs_of(ReplayBatchSampler, dataset, 8, 10, share=share)
    batches = [batch for epoch in epochs for batch in epoch]
    assert {len(batch) for batch in batches} == {8}
    drawn = Counter(index % len(dataset) for batch in batches for index in batch)
    own, replayed = ([drawn[index] for index in indices] for indices in dataset.ranges.values())
    if share:
        assert sum(own) == sum(replayed) == 4 * len(batches)
    for counts in (own, replayed):
        assert max(counts) - min(counts) <= 1  # equally often
    # An image that comes a second time is another draw of it.
    assert all(len(set(batch)) == 8 for batch in batches)


@TRANSFORMS.register_module()
class NoteDraw:
    """Puts a random number in the place of the image."""

    def __call__(self, results: dict) -> dict:
        results['img'] = np.full((2, 2, 3), np.random.rand())
        return results


def test_an_image_is_drawn_anew_in_each_pass(shapes_root: Any) -> None:
    init_default_scope('mmseg')
    steps = [dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'NoteDraw', 'PackSegInputs')]
    inner = dict(
        type='ShapesDataset', data_root=str(shapes_root), split='train', num_images=24, num_classes=6, image_size=64,
        pipeline=steps,
    )  # fmt: skip
    cfg = dict(type='IncrementalDataset', dataset=inner, protocol='3-3', stage=1, seed=0)
    dataset = DATASETS.build(cfg)
    size = len(dataset)
    dataset.set_epoch(2)
    drawn = [float(dataset[index]['inputs'].double().mean()) for index in (1, 1 + size, 1 + 2 * size, 1 + 3 * size)]
    assert len({drawn[1], drawn[2], drawn[3]}) == 3
    assert drawn[0] == drawn[2]  # the pass is what the epoch is
    assert len(list(dataset)) == size
    assert dataset[1 + size]['data_samples'].img_path == dataset[1]['data_samples'].img_path


def test_num_batch_per_epoch_limits_the_images_of_endless_batches() -> None:
    """As it does without them, by mmengine's slice of the data set."""
    loader = Runner.build_dataloader(
        dict(
            dataset=torch.utils.data.TensorDataset(torch.arange(9)), batch_size=2, num_workers=0, num_batch_per_epoch=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_sampler=dict(type='SharedBatchSampler', endless=True),
        ),
        seed=0,
    )  # fmt: skip
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        assert [int(value) for batch in loader for value in batch[0]] == [0, 1, 2, 3]
