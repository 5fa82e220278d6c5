# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How many batches an epoch of a stage has."""

import pytest
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from mmseg_sats.engine.training.stage_runner import StageRunner


@DATASETS.register_module()
class NumbersOfATest(Dataset):
    """The numbers below ``length``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def full_init(self) -> None:
        """Nothing to read."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index >= self.length:
            raise IndexError(index)
        return index


@pytest.mark.parametrize(
    ('images', 'batches', 'expected'), [(3, 2, [[0, 1], [2]]), (4, 2, [[0, 1], [2, 3]]), (9, 2, [[0, 1], [2, 3]])]
)
def test_a_bound_of_batches_asks_for_no_image_past_the_last(
    images: int, batches: int, expected: list[list[int]]
) -> None:
    loader = StageRunner.build_dataloader(
        dict(
            dataset=dict(type='NumbersOfATest', length=images),
            batch_size=2,
            num_workers=0,
            num_batch_per_epoch=batches,
            sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
            collate_fn=dict(type='default_collate'),
        )
    )
    assert [batch.tolist() for batch in loader] == expected
