# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The GPU's kernels for region means give what the chunks give.

Without a GPU Triton's interpreter runs them: install triton and set TRITON_INTERPRET=1.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from mmseg_sats.functional.attention.attention_map import AttentionMap, _RegionMean
from mmseg_sats.functional.attention.class_regions import find_regions
from tests.test_attention import make_labels, make_map

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
if not find_spec('triton') or not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip('needs a GPU, or triton and TRITON_INTERPRET=1', allow_module_level=True)

fused_pooling = import_module('mmseg_sats.functional.attention.triton_pooling')
FusedRegionMean, can_fuse = fused_pooling.FusedRegionMean, fused_pooling.can_fuse

DEVICE = 'cpu' if INTERPRETED else 'cuda'
# The interpreter multiplies bfloat16 as if it were integers.
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
SHAPES = {
    'small': dict(),
    'more rows and keys than a block': dict(heads=2, query_hw=(16, 12), key_hw=(9, 9), dim=20),
    'wide heads': dict(heads=1, query_hw=(8, 12), key_hw=(6, 8), dim=96),
    'many images': dict(batch=5, heads=2),
}


def compare(attention: AttentionMap, labels: torch.Tensor, **tolerance: float) -> None:
    regions = find_regions(labels.to(DEVICE))
    found = []
    for function in (_RegionMean, FusedRegionMean):
        query, key = (
            tensor.detach().to(DEVICE).requires_grad_() for tensor in (attention.query, attention.key)
        )
        means = function.apply(query, key, attention.scale, regions)
        grad = torch.randn(means.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        found.append([means.detach(), *torch.autograd.grad(means, (query, key), grad)])
    for expected, got in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize('programs', [1, 1000])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_means_and_gradients_are_those_of_chunks(
    monkeypatch: pytest.MonkeyPatch, shape: dict, programs: int
) -> None:
    monkeypatch.setattr(fused_pooling, 'PROGRAMS', programs)
    attention = make_map(**shape)
    labels = make_labels(len(attention.query), attention.query_hw)
    if len(labels) > 2:
        labels[-1, 1:] = 0  # a short image among longer ones
        labels[2] = 255  # and an empty one
    compare(attention, labels, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('dtype', HALF)
def test_half_precision_is_multiplied_exactly(dtype: torch.dtype) -> None:
    attention = make_map(heads=2, query_hw=(16, 12), key_hw=(9, 9), dim=32, dtype=dtype)
    compare(attention, make_labels(hw=(16, 12)), rtol=1e-2, atol=1e-6)
    # The means are float32 throughout.
    regions = find_regions(make_labels(hw=(16, 12)).to(DEVICE))
    half = [tensor.detach().to(DEVICE) for tensor in (attention.query, attention.key)]
    means = FusedRegionMean.apply(*half, attention.scale, regions)
    expected = _RegionMean.apply(*(own.float() for own in half), attention.scale, regions)
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-6)


def test_heads_may_be_views_of_a_projection() -> None:
    attention = make_map()
    query, key = (
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2)
        for tensor in (attention.query, attention.key)
    )
    assert not query.is_contiguous()
    views = AttentionMap(query, key, attention.scale, attention.query_hw, attention.key_hw)
    compare(views, make_labels(), rtol=1e-5, atol=2e-6)


def test_what_the_kernels_are_not_made_for() -> None:
    attention, regions = make_map(), find_regions(make_labels())
    assert can_fuse(attention.query, attention.key, regions)
    assert not can_fuse(attention.query.double(), attention.key.double(), regions)
    assert not can_fuse(attention.query, attention.key, find_regions(0 * make_labels()))
    classes = torch.arange(1, 71).view(1, 7, 10)
    assert not can_fuse(attention.query, attention.key, find_regions(classes))
    assert can_fuse(attention.query, attention.key, find_regions(classes.clamp(max=64)))
    wide = make_map(dim=200)
    assert not can_fuse(wide.query, wide.key, regions)


def test_a_device_that_triton_cannot_serve_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_pooling.kernels_run(torch.device(DEVICE))

    def fail(*args: object) -> None:
        raise RuntimeError('Failed to find C compiler')

    monkeypatch.setattr(FusedRegionMean, 'apply', fail)
    assert not fused_pooling.kernels_run(torch.device(DEVICE))
