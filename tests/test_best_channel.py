# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The largest channel of each pixel."""

import pytest
import torch

from mmseg_sats.functional.best_channel import best_channel


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(2, 300, 5, 4), (3, 2, 7), (1, 1, 1, 1)])
def test_it_is_torchs_maximum_and_the_first_of_equal_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).round(decimals=1).to(dtype)
    values[0] = -torch.inf
    values[0, -1:] = 0  # all others are masked out
    best, channel = best_channel(values)
    assert torch.equal(best, values.amax(1))
    assert best.dtype == dtype
    equal = (values == values.amax(1, keepdim=True)).int()
    assert torch.equal(channel, equal.argmax(1))  # the first
    assert torch.equal(values.gather(1, channel.unsqueeze(1))[:, 0], best)


def test_a_value_that_is_no_number_has_a_channel_still() -> None:
    values = torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])[None]
    best, channel = best_channel(values)
    assert best[0, 0].isnan()
    assert channel.tolist() == values.argmax(1).tolist() == [[1, 1]]
    assert best_channel(torch.full((1, 3, 2), torch.nan))[1].tolist() == [[0, 0]]
