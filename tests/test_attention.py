# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The attention value: its dense map, its class-region means, and what they store."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_sats.functional.attention import attention_map as module
from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.attention.class_regions import find_regions, find_regions_on_grids
from mmseg_sats.models.losses import crp_loss


def make_map(
    batch: int = 2,
    heads: int = 3,
    query_hw: tuple[int, int] = (5, 7),
    key_hw: tuple[int, int] = (2, 3),
    dim: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionMap:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, query_hw[0] * query_hw[1], dim, generator=generator)
    key = torch.randn(batch, heads, key_hw[0] * key_hw[1], dim, generator=generator)
    query, key = (tensor.to(dtype).requires_grad_() for tensor in (query, key))
    return AttentionMap(query, key, dim**-0.5, query_hw, key_hw)


def set_chunks(monkeypatch: pytest.MonkeyPatch, elements: int, padded: bool) -> None:
    """Chunks of so many elements; padded as on a device that has no size of its own."""
    monkeypatch.setattr(module, 'CHUNK_ELEMENTS', {} if padded else {'cpu': elements})
    monkeypatch.setattr(module, 'DEFAULT_CHUNK_ELEMENTS', elements)


def make_labels(batch: int = 2, hw: tuple[int, int] = (5, 7), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 0, 1, 3, 200, 255])
    return values[torch.randint(len(values), (batch, *hw), generator=generator)]


def pool_dense(attention: AttentionMap, labels: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """The region means by the book: dense map, then a loop over images and classes."""
    dense = attention.dense()
    means, images, classes = [], [], []
    for image, flat in enumerate(labels.flatten(1)):
        for label in sorted(set(flat.tolist()) - {0, 255}):
            means.append(dense[image][:, flat == label].mean(1))
            images.append(image)
            classes.append(label)
    return torch.stack(means), images, classes


def gradients(output: Tensor, attention: AttentionMap) -> tuple[Tensor, Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad(
        (output * weights.to(output.dtype)).sum(), (attention.query, attention.key)
    )


def test_grids_may_be_lists() -> None:
    made = make_map()
    lists = AttentionMap(made.query, made.key, made.scale, list(made.query_hw), list(made.key_hw))
    labels = torch.ones(len(made.query), 10, 14, dtype=torch.long)
    assert lists.query_hw == made.query_hw
    assert crp_loss([lists], [made], labels) == 0


def test_dense_is_the_softmax_of_scaled_products() -> None:
    query = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    key = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    dense = AttentionMap(query, key, 0.5, (1, 2), (2, 1)).dense()
    expected = torch.tensor([[0.5, 0.0], [0.0, 1.0]]).softmax(-1)
    torch.testing.assert_close(dense, expected[None, None])


def test_rows_are_rows_of_dense() -> None:
    attention = make_map()
    torch.testing.assert_close(attention.rows(3, 11), attention.dense()[:, :, 3:11])


def test_pool_by_hand() -> None:
    # Two keys; the logit of the first is 0, 2 ln 3 or ln 3, so the row is (1/2, 1/2), (9/10, 1/10)
    # or (3/4, 1/4).
    log3 = torch.log(torch.tensor(3.0))
    query = torch.stack([0 * log3, 2 * log3, log3, log3]).view(1, 1, 4, 1)
    key = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    labels = torch.tensor([[[4, 4], [0, 9]]])
    pooled, image, label = AttentionMap(query, key, 1.0, (2, 2), (1, 2)).pool(labels)
    torch.testing.assert_close(pooled, torch.tensor([[[0.7, 0.3]], [[0.75, 0.25]]]))
    assert image.tolist() == [0, 0]
    assert label.tolist() == [4, 9]


@pytest.mark.parametrize('chunk', [1, 18, 19, 40, 100, 10**6])
@pytest.mark.parametrize('batch', [1, 5])
@pytest.mark.parametrize('padded', [False, True])
def test_pool_equals_pooled_dense(
    monkeypatch: pytest.MonkeyPatch, chunk: int, batch: int, padded: bool
) -> None:
    set_chunks(monkeypatch, chunk, padded)
    attention, labels = make_map(batch), make_labels(batch)
    labels[-1, 1:] = 0  # a short image among longer ones
    if batch > 2:
        labels[2] = 255  # and an empty one
    pooled, image, label = attention.pool(labels)
    expected, images, classes = pool_dense(attention, labels)
    assert (image.tolist(), label.tolist()) == (images, classes)
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=0)
    for got, want in zip(gradients(pooled, attention), gradients(expected, attention), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize('padded', [False, True])
def test_chunks_cover_every_row_once_within_the_limit(padded: bool) -> None:
    rows, limit, row_elements = [7, 0, 3, 25, 1, 1, 0], 60, 6
    seen = torch.zeros(len(rows), max(rows), dtype=torch.long)
    chunks = list(module._chunks(rows, row_elements, limit, padded))
    for images, span in chunks:
        assert (images.stop - images.start) * (span.stop - span.start) * row_elements <= limit
        seen[images, span] += 1
    assert any(images.stop - images.start > 1 for images, _ in chunks)
    assert padded or seen.sum() == sum(rows)
    for count, image in zip(rows, seen, strict=True):
        assert (image[:count] == 1).all()
    assert seen.max() == 1


@pytest.mark.parametrize('padded', [False, True])
def test_what_background_holds_does_not_come_in(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    set_chunks(monkeypatch, 10**6, padded)
    labels = make_labels(5)
    labels[-1, 1:] = 0  # fewer rows than the others have
    labels[2] = 255
    clean, spoilt = make_map(5), make_map(5)
    outside = ((labels == 0) | (labels == 255)).flatten(1)
    with torch.no_grad():
        spoilt.query.transpose(1, 2)[outside] = torch.tensor([float('nan'), float('inf'), 1.0, -1.0])
    pooled = [attention.pool(labels)[0] for attention in (clean, spoilt)]
    assert torch.equal(*pooled)
    for got, want in zip(gradients(pooled[1], spoilt), gradients(pooled[0], clean), strict=True):
        assert torch.equal(got, want)


class _SoftmaxRows(TorchDispatchMode):
    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.rows += result[..., 0].numel()
        return result


def test_rows_of_background_are_never_computed() -> None:
    attention, labels = make_map(5), make_labels(5)
    labels[-1, 1:] = 0
    labels[2] = 255
    foreground = int(((labels != 0) & (labels != 255)).sum())
    with _SoftmaxRows() as record:
        pooled = attention.pool(labels)[0]
    assert record.rows == 3 * foreground
    with _SoftmaxRows() as record:
        pooled.sum().backward()
    assert record.rows == 3 * foreground


def test_pool_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'CHUNK_ELEMENTS', {'cpu': 20})
    attention = make_map(heads=2, query_hw=(3, 4), key_hw=(1, 3), dim=2, dtype=torch.float64)
    labels = make_labels(hw=(3, 4))

    def pool(query: Tensor, key: Tensor) -> Tensor:
        return AttentionMap(query, key, attention.scale, (3, 4), (1, 3)).pool(labels)[0]

    assert torch.autograd.gradcheck(pool, (attention.query, attention.key))


def test_pool_takes_heads_as_views_of_a_projection() -> None:
    contiguous, labels = make_map(), make_labels()
    packed = contiguous.query.detach().transpose(1, 2).contiguous().flatten(2).requires_grad_()
    query = packed.unflatten(2, (3, 4)).transpose(1, 2)
    view = AttentionMap(query, contiguous.key, contiguous.scale, (5, 7), (2, 3))
    torch.testing.assert_close(view.pool(labels)[0], contiguous.pool(labels)[0])
    view.pool(labels)[0].square().sum().backward()
    contiguous.pool(labels)[0].square().sum().backward()
    torch.testing.assert_close(
        packed.grad.unflatten(2, (3, 4)).transpose(1, 2), contiguous.query.grad
    )


def test_no_region_gives_an_empty_result_in_the_graph() -> None:
    attention = make_map()
    pooled, image, label = attention.pool(torch.tensor([0, 255, 0, 255, 0, 0, 0]).expand(2, 5, 7))
    assert pooled.shape == (0, 3, 6)
    assert image.numel() == label.numel() == 0
    pooled.sum().backward()
    assert attention.query.grad.abs().sum() == 0
    assert attention.key.grad.abs().sum() == 0


def test_ignore_index_may_be_another_label() -> None:
    attention, labels = make_map(), make_labels()
    _, _, label = attention.pool(labels, ignore_index=3)
    assert set(label.tolist()) == {1, 200, 255}
    labels[labels == 255] = -100
    _, _, label = attention.pool(labels, ignore_index=-100)
    assert set(label.tolist()) == {1, 3, 200}


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    attention, labels = make_map(), make_labels()
    torch.testing.assert_close(attention.pool(labels.to(dtype)), attention.pool(labels))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    half, labels = make_map(dtype=dtype), make_labels()
    query, key = (tensor.detach().float().requires_grad_() for tensor in (half.query, half.key))
    full = AttentionMap(query, key, half.scale, half.query_hw, half.key_hw)
    with torch.autocast('cpu', torch.bfloat16):
        pooled, dense = half.pool(labels)[0], half.dense()
        got = gradients(pooled, half)
    assert pooled.dtype == dense.dtype == torch.float32
    torch.testing.assert_close(pooled, full.pool(labels)[0])
    torch.testing.assert_close(dense, full.dense())
    for mine, exact in zip(got, gradients(full.pool(labels)[0], full), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, exact.to(dtype))


def test_autocast_does_not_touch_float32_or_float64() -> None:
    labels = make_labels()
    for dtype in (torch.float32, torch.float64):
        attention = make_map(dtype=dtype)
        plain = attention.pool(labels)[0]
        with torch.autocast('cpu', torch.bfloat16):
            cast = attention.pool(labels)[0]
            cast_gradients = gradients(cast, attention)
        assert cast.dtype == dtype
        assert torch.equal(cast, plain)
        for got, want in zip(cast_gradients, gradients(plain, attention), strict=True):
            assert torch.equal(got, want)


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_the_dense_map_is_neither_built_nor_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'CHUNK_ELEMENTS', {'cpu': 2000})
    attention = make_map(heads=2, query_hw=(24, 24), key_hw=(8, 8), dim=2)
    labels = torch.ones(2, 24, 24, dtype=torch.long)
    dense, saved = 2 * 2 * 24**2 * 64, []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with _LargestTensor() as record, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention.pool(labels)[0].square().sum().backward()
    inputs = max(attention.query.numel(), attention.key.numel())
    assert max(saved) <= inputs
    assert record.largest <= max(inputs, 2000) < dense / 10
    # The watch itself works: the dense map is seen when it is built.
    with _LargestTensor() as record:
        attention.dense()
    assert record.largest == dense


def test_backward_leaves_background_queries_alone() -> None:
    attention, labels = make_map(), make_labels()
    attention.pool(labels)[0].square().sum().backward()
    outside = ((labels == 0) | (labels == 255)).flatten(1)
    moved = attention.query.grad.abs().sum((1, 3)) > 0
    assert torch.equal(moved, ~outside)


def test_detach_cuts_the_graph() -> None:
    attention = make_map()
    assert not attention.detach().pool(make_labels())[0].requires_grad
    assert attention.num_heads == 3
    assert attention.shape == (2, 3, 35, 6)


def test_regions_of_a_small_batch() -> None:
    labels = torch.tensor([[[2, 0], [1, 2]], [[0, 0], [255, 0]], [[0, 2], [255, 0]]])
    regions = find_regions(labels)
    image, label, slot, count = regions.columns
    assert image.tolist() == [0, 0, 2]
    assert label.tolist() == [1, 2, 2]
    assert slot.tolist() == [0, 1, 0]
    assert count.tolist() == [1, 2, 1]
    assert regions.slots.tolist() == [[1, -1, 0, 1], [-1] * 4, [-1, 0, -1, -1]]
    assert regions.order.tolist() == [[0, 2, 3, 1], [4, 5, 6, 7], [9, 8, 10, 11]]
    assert regions.ordered_slots.tolist() == [[1, 0, 1, -1], [-1] * 4, [0, -1, -1, -1]]
    assert regions.presence.tolist() == [[False, True, True], [False] * 3, [False, False, True]]
    assert (regions.rows, regions.width) == ((3, 0, 1), 2)
    assert regions.positions.tolist() == [[0, 2, 3], [4, 5, 6], [9, 8, 10]]
    assert regions.weights(torch.float32).tolist() == [
        [[0, 1, 0], [0.5, 0, 0.5]], [[0] * 3] * 2, [[1, 0, 0], [0] * 3]
    ]


# Of 690 rows the 86th of 172 is another one in float64 than in the float32 of resized labels.
@pytest.mark.parametrize('size', [(13, 11), (4, 6), (690, 7)])
def test_regions_on_several_grids_are_those_of_each(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 3, 20, 255])[torch.randint(6, (3, *size), generator=generator)]
    labels[1] = 0
    grids = [(4, 6), (1, 1), (2, 3), (4, 6), (9, 5), (172, 7)]
    together = find_regions_on_grids(labels, grids, num_labels=21)
    assert together.keys() == set(grids)
    for grid, found in together.items():
        resized = F.interpolate(labels[:, None].float(), grid, mode='nearest')[:, 0].long()
        alone = find_regions(resized, num_labels=21)
        for name in ('slots', 'order', 'ordered_slots', 'presence', 'table'):
            assert torch.equal(getattr(found, name), getattr(alone, name)), name
        assert found.rows == alone.rows
        # Its width is that of the grid with the most classes.
        assert torch.equal(found.shares[:, : alone.width], alone.shares)
        assert found.shares[:, alone.width :].count_nonzero() == 0
        foreground = (resized != 0) & (resized != 255)
        assert found.rows == tuple(foreground.flatten(1).sum(1).tolist())
        image, label, slot, count = found.columns
        for one in zip(image, label, slot, count, strict=True):
            own = found.slots[one[0]] == one[2]
            assert torch.equal(own, (resized[one[0]] == one[1]).flatten())
            assert own.sum() == one[3]
        assert len(image) == sum(
            len(set(picture.unique().tolist()) - {0, 255}) for picture in resized
        )


def test_a_batch_may_be_empty_of_images_and_a_grid_need_not_meet_every_label() -> None:
    assert find_regions(torch.zeros(0, 4, 4, dtype=torch.long)).width == 0
    labels = torch.ones(1, 8, 8, dtype=torch.long)
    labels[0, 1, 1] = -1
    with pytest.raises(ValueError, match=r'negative.* got -1'):
        find_regions_on_grids(labels, [(4, 4)])
    (regions,) = find_regions_on_grids(labels, [(4, 4)], num_labels=2).values()
    assert regions.rows == (16,)


@pytest.mark.parametrize('wrong', [21, 300, -1, -7])
def test_a_label_over_the_known_bound_is_refused(wrong: int) -> None:
    labels = torch.tensor([[[0, 1], [wrong, 255]]])
    with pytest.raises(ValueError, match=rf'0\.\.20 or ignore_index=255, got \[{wrong}\]'):
        find_regions(labels, num_labels=21)


def test_labels_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r'\(2, 5, 7\), got \(2, 7, 5\)'):
        make_map().pool(make_labels(hw=(7, 5)))
    with pytest.raises(ValueError, match=r'integers, got torch\.float32'):
        make_map().pool(make_labels().float())
    with pytest.raises(ValueError, match=r'negative.* got -3'):
        make_map().pool(make_labels() - 3)


@pytest.mark.parametrize(
    ('query', 'key', 'query_hw', 'key_hw', 'message'),
    [
        ((1, 2, 6, 4), (1, 2, 4, 5), (2, 3), (2, 2), r'\(1, 2, 6, 4\) and \(1, 2, 4, 5\)'),
        ((1, 2, 6, 4), (1, 1, 4, 4), (2, 3), (2, 2), r'\(1, 2, 6, 4\) and \(1, 1, 4, 4\)'),
        ((2, 6, 4), (2, 4, 4), (2, 3), (2, 2), r'\(2, 6, 4\) and \(2, 4, 4\)'),
        ((1, 2, 6, 4), (1, 2, 4, 4), (3, 3), (2, 2), r'query_hw \(3, 3\) does not hold 6'),
        ((1, 2, 6, 4), (1, 2, 4, 4), (2, 3), (1, 2), r'key_hw \(1, 2\) does not hold 4'),
    ],
)
def test_shapes_that_do_not_agree_are_refused(query, key, query_hw, key_hw, message) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMap(torch.zeros(query), torch.zeros(key), 1.0, query_hw, key_hw)
