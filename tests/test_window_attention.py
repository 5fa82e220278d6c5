# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Attention within windows: its dense map by the book, its pooled means and the loss against loops over that."""

from typing import Any

import pytest
import torch
from mmseg.models.backbones.beit import BEiTAttention
from torch import Tensor, nn

from mmseg_sats.functional.features.region_distances import DISTANCES
from mmseg_sats.models.attention import AttentionMap, WindowAttentionMap, Windows
from mmseg_sats.models.losses import crp_loss
from tests.test_attention import _LargestTensor, make_labels, pool_dense, set_chunks
from tests.test_crp_loss import OPTIONS, distance_of, regions_of
from tests.test_crp_loss import make_labels as make_large_labels

HW = (5, 7)
PLAIN, SHIFTED = Windows(HW, (3, 3)), Windows(HW, (3, 3), (1, 1))
CUTS = [PLAIN, SHIFTED, Windows(HW, (2, 4), (0, 3)), Windows(HW, (7, 7), (3, 3)), Windows(HW, HW, extra_tokens=2)]
IDS = ['plain', 'shifted', 'oblong', 'one_padded', 'one_with_extra_tokens']


def make_map(
    windows: Windows = SHIFTED, batch: int = 2, heads: int = 3, dim: int = 4,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> WindowAttentionMap:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, windows.count, heads, windows.tokens, dim)
    query, key = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(windows.count, heads, windows.tokens, windows.tokens, generator=generator).to(dtype)
    query, key, bias = (own.requires_grad_() for own in (query, key, bias))
    mask = windows.mask(torch.device('cpu'))
    return WindowAttentionMap(query, key, 0.6, windows, bias if mask is None else bias + mask)


def by_the_book(attention: WindowAttentionMap) -> Tensor:
    """The map as mmseg cuts the grid: pad, roll, cut; one row and one key at a time put where they belong."""
    windows = attention.windows
    (height, width), (padded_height, padded_width) = windows.hw, windows.padded_hw
    image = torch.full((padded_height, padded_width), -1)
    image[:height, :width] = torch.arange(height * width).view(height, width)
    image = torch.roll(image, (-windows.shift[0], -windows.shift[1]), (0, 1))
    cut = [
        [-1] * windows.extra_tokens + image[i : i + windows.size[0], j : j + windows.size[1]].flatten().tolist()
        for i in range(0, padded_height, windows.size[0])
        for j in range(0, padded_width, windows.size[1])
    ]
    outside = iter(range(10**6))
    keys = [[next(outside) if place < 0 else windows.extra_keys + place for place in window] for window in cut]
    scores = attention.query @ attention.key.mT * attention.scale
    weights = (scores if attention.bias is None else scores + attention.bias).softmax(-1)
    rows = [None] * (height * width)
    for number, window in enumerate(cut):
        for token, place in enumerate(window):
            if place >= 0:
                row = torch.zeros(*attention.shape[:2], attention.shape[3], dtype=weights.dtype)
                rows[place] = row.index_copy(2, torch.tensor(keys[number]), weights[:, number, :, token])
    return torch.stack(rows, 2)


def gradients(value: Tensor, attention: WindowAttentionMap) -> list[Tensor]:
    factor = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value.dtype)
    return list(torch.autograd.grad((value * factor).sum(), attention.tensors, retain_graph=True))


def assert_close(got: Any, want: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=atol)


@pytest.mark.parametrize('windows', CUTS, ids=IDS)
def test_the_map_is_that_of_the_windows(windows: Windows) -> None:
    attention = make_map(windows)
    dense = attention.dense()
    assert tuple(dense.shape) == attention.shape == (2, 3, 35, windows.count * windows.tokens)
    assert_close(dense, by_the_book(attention))
    assert_close(dense.sum(-1), torch.ones(2, 3, 35, dtype=dense.dtype))
    assert_close(attention.rows(4, 19), dense[:, :, 4:19])
    assert_close(gradients(dense, attention), gradients(by_the_book(attention), attention))
    assert (attention.query_hw, attention.key_hw) == (HW, HW)
    assert attention.extra_keys == attention.shape[3] - 35


@pytest.mark.parametrize('chunk', [1, 600, 10**6])
@pytest.mark.parametrize('windows', CUTS, ids=IDS)
def test_pool_equals_pooled_dense(monkeypatch: pytest.MonkeyPatch, windows: Windows, chunk: int) -> None:
    set_chunks(monkeypatch, chunk, padded=False)
    attention, labels = make_map(windows, batch=4), make_labels(4)
    labels[-1, 1:] = 0  # a short image among longer ones
    labels[2] = 255  # and an empty one
    pooled, image, label = attention.pool(labels)
    expected, images, classes = pool_dense(attention, labels)
    assert (image.tolist(), label.tolist()) == (images, classes)
    assert_close(pooled, expected)
    assert_close(gradients(pooled, attention), gradients(expected, attention))


def test_a_window_that_is_the_grid_is_an_attention_map() -> None:
    made, labels = make_map(Windows(HW, HW)), make_labels()
    windowed = WindowAttentionMap(made.query, made.key, made.scale, made.windows)
    plain = AttentionMap(made.query.squeeze(1), made.key.squeeze(1), made.scale, HW, HW)
    assert_close(windowed.dense(), plain.dense())
    assert_close(windowed.pool(labels), plain.pool(labels))
    assert [own is mine for own, mine in zip(windowed.tensors, (made.query, made.key), strict=True)] == [True] * 2


def loops(student: list[WindowAttentionMap], teacher: list[WindowAttentionMap], labels: Tensor, pooling: str,
          distance: str, normalisation: str) -> Tensor:
    """Eq. (2) over the dense maps: loops over blocks, images, classes and heads."""
    regions = [regions_of(labels, own.query_hw, pooling) for own in student]
    total = torch.zeros((), dtype=torch.float64)
    for j, (new, old) in enumerate(zip(student, teacher, strict=True)):
        maps = [by_the_book(new), by_the_book(old.detach())]
        for i in range(len(labels)):
            classes = set(regions[j][i])
            if normalisation == 'paper':
                classes = set().union(*(block[i] for block in regions))
            heads = new.num_heads if normalisation == 'per_block' else student[-1].num_heads
            divisor = len(labels) * len(classes) * heads * (len(student) if normalisation == 'per_block' else 1)
            for inside in regions[j][i].values():
                one, other = (own[i][:, inside.flatten()] for own in maps)
                if pooling == 'none':
                    terms = [distance_of(a, b, distance) for a, b in zip(one.flatten(0, 1), other.flatten(0, 1),
                                                                         strict=True)]
                    total = total + sum(terms) / inside.sum() / divisor
                else:
                    pairs = zip(one.mean(1), other.mean(1), strict=True)
                    total = total + sum(distance_of(a, b, distance) for a, b in pairs) / divisor
    return total


@pytest.mark.parametrize(('pooling', 'distance', 'normalisation'), OPTIONS)
def test_the_loss_equals_the_loops_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, pooling: str, distance: str, normalisation: str
) -> None:
    set_chunks(monkeypatch, 600, padded=False)
    labels = make_large_labels()
    student, teacher = (
        [make_map(SHIFTED, 4, 3, seed=seed), make_map(Windows((3, 4), (3, 3)), 4, 2, seed=seed)] for seed in (0, 1)
    )
    options = dict(pooling=pooling, distance=distance, normalisation=normalisation)
    loss, expected = crp_loss(student, teacher, labels, **options), loops(student, teacher, labels, **options)
    assert_close(loss, expected, 1e-9)
    leaves = [own for block in student for own in block.tensors]
    assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), 1e-9)
    kept = [own for block in teacher for own in block.tensors]
    assert set(torch.autograd.grad(crp_loss(student, teacher, labels), kept, allow_unused=True)) == {None}


@pytest.mark.parametrize('pooling', ['class', 'global', 'none'])
def test_the_same_maps_have_no_distance(pooling: str) -> None:
    attention = make_map()
    loss = crp_loss([attention], [attention], make_large_labels()[:2], pooling=pooling)
    assert loss == 0
    assert all(own.abs().sum() == 0 for own in torch.autograd.grad(loss, attention.tensors))


def test_maps_of_other_windows_are_no_pair() -> None:
    one, other = make_map(Windows(HW, (3, 3), (1, 1))), make_map(Windows(HW, (3, 3), (2, 2)))
    with pytest.raises(ValueError, match=r'block 0: student and teacher must agree.*by \(1, 1\).*by \(2, 2\)'):
        crp_loss([one], [other], make_large_labels()[:2])
    with pytest.raises(ValueError, match='expected the same windows'):
        one.mean_row_distance(other, DISTANCES['l2'])


def test_what_background_and_padding_hold_does_not_come_in() -> None:
    labels = make_labels()
    clean, spoilt = (make_map().detach() for _ in range(2))
    background = ((labels == 0) | (labels == 255)).flatten(1)
    keys = SHIFTED.keys(torch.device('cpu'))
    asks = torch.cat([torch.zeros(2, SHIFTED.extra_keys, dtype=torch.bool), ~background], 1)[:, keys]
    spoilt.query.transpose(2, 3)[~asks] = float('nan')
    for own in (clean, spoilt):
        own.query.requires_grad_()
    pooled = [own.pool(labels)[0] for own in (clean, spoilt)]
    assert torch.equal(*pooled)
    for own, value in zip((clean, spoilt), pooled, strict=True):
        value.square().sum().backward()
        assert own.query.grad.transpose(2, 3)[~asks].abs().sum() == 0
    assert torch.equal(clean.query.grad, spoilt.query.grad)


def test_no_region_gives_an_empty_result_in_the_graph() -> None:
    attention = make_map()
    pooled, image, _ = attention.pool(torch.zeros(2, *HW, dtype=torch.long))
    assert pooled.shape == (0, 3, attention.shape[3])
    assert image.numel() == 0
    assert all(own.abs().sum() == 0 for own in torch.autograd.grad(pooled.sum(), attention.tensors))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    half, labels = make_map(dtype=dtype).detach(), make_labels()
    full = WindowAttentionMap(half.query.float(), half.key.float(), half.scale, half.windows, half.bias.float())
    with torch.autocast('cpu', torch.bfloat16):
        pooled, dense = half.pool(labels)[0], half.dense()
        distance = half.mean_row_distance(make_map(seed=1).detach(), DISTANCES['l2'])
    assert pooled.dtype == dense.dtype == torch.float32
    assert torch.equal(pooled, full.pool(labels)[0])
    assert torch.equal(dense, full.dense())
    assert torch.equal(distance, full.mean_row_distance(make_map(seed=1).detach(), DISTANCES['l2']))


def test_the_map_over_the_image_is_neither_built_nor_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, 20000, padded=False)
    windows = Windows((40, 40), (4, 4), (2, 2))
    attention = make_map(windows, heads=2)
    labels, saved = torch.ones(2, 40, 40, dtype=torch.long), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    for work in (lambda: attention.pool(labels)[0], lambda: crp_loss([attention], [make_map(windows, heads=2, seed=1)],
                                                                     labels, pooling='none')):
        saved.clear()
        with _LargestTensor() as record, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            work().square().sum().backward(inputs=attention.tensors)
        inputs = max(own.numel() for own in attention.tensors)
        assert max(saved) <= inputs
        # An image's windows have 2 * 16 entries at each of 1600 places, its map 2 * 1600.
        assert record.largest <= max(inputs, 20000) <= 2 * 16 * 1600 < 2 * 1600 * 1600


def test_pool_gradcheck() -> None:
    attention, labels = make_map(Windows((3, 4), (2, 3), (1, 1)), heads=2, dim=2), make_labels(hw=(3, 4))

    def pool(*tensors: Tensor) -> Tensor:
        query, key, bias = tensors
        return WindowAttentionMap(query, key, attention.scale, attention.windows, bias).pool(labels)[0]

    leaves = [own.detach().requires_grad_() for own in attention.tensors]
    assert torch.autograd.gradcheck(pool, leaves)


def test_a_bias_may_be_shared_by_windows_and_heads() -> None:
    made = make_map()
    for shape in ((1, 1, 9, 9), (9, 9), (3, 9, 9), (6, 1, 9, 9)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        attention = WindowAttentionMap(made.query, made.key, made.scale, SHIFTED, bias)
        assert_close(attention.dense(), by_the_book(attention))
        pooled, expected = (attention.pool(make_labels())[0], pool_dense(attention, make_labels())[0])
        assert_close(gradients(pooled, attention), gradients(expected, attention))


def test_detach_cuts_the_graph() -> None:
    attention = make_map()
    assert attention.dense().requires_grad
    assert not attention.detach().dense().requires_grad
    assert torch.equal(attention.detach().dense(), attention.dense())


def test_what_does_not_fit_is_refused() -> None:
    made = make_map()
    for windows, query in ((Windows(HW, (2, 2)), made.query), (SHIFTED, made.query.flatten(0, 1))):
        with pytest.raises(ValueError, match='query and key must both be'):
            WindowAttentionMap(query, query, 1.0, windows)
    for shape in ((2, 9, 9), (1, 6, 3, 9, 9)):
        with pytest.raises(ValueError, match=r'bias must expand to \(6, 3, 9, 9\)'):
            WindowAttentionMap(made.query, made.key, 1.0, SHIFTED, torch.zeros(shape))
    for wrong in (dict(shift=(3, 0)), dict(size=(0, 3)), dict(hw=(0, 3)), dict(extra_tokens=-1)):
        with pytest.raises(ValueError, match='expected a grid and windows of 1 x 1'):
            Windows(**dict(hw=HW, size=(3, 3)) | wrong)
    with pytest.raises(ValueError, match='must be on the query grid'):
        made.pool(torch.ones(2, 7, 5, dtype=torch.long))


def test_lists_do_for_windows() -> None:
    assert Windows([5, 7], [3, 3], [1, 1]) == SHIFTED


def test_a_bias_without_windows_is_a_single_window() -> None:
    """BEiT's attention: a class token in front, and a learned bias between all tokens."""
    torch.manual_seed(0)
    attention = BEiTAttention(8, 2, (3, 4))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, seen = torch.randn(2, 13, 8), []
    attention.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    attention(x)
    bias = torch.cat([attention.q_bias, torch.zeros(8), attention.v_bias])
    packed = nn.functional.linear(x, attention.qkv.weight, bias).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    table = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
    made = WindowAttentionMap(
        packed[0].unsqueeze(1), packed[1].unsqueeze(1), attention.scale, Windows((3, 4), (3, 4), extra_tokens=1), table
    )
    assert made.extra_keys == 1
    assert_close(made.dense(), seen[0][:, :, 1:], 1e-6)
