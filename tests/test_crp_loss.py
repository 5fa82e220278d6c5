# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Class-region pooled distillation against eq. (1) and (2) of SATS, written out as loops."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.attention import attention_map as attention_module
from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.functional.features import region_distances
from mmseg_sats.models.losses.crp_loss import CRPDistillationLoss, crp_loss
from mmseg_sats.models.segmentor_output import SegmentorOutput

GRIDS = ((7, 9), (5, 4), (2, 3))
HEADS = (1, 4, 2)
KEYS = ((2, 3), (2, 2), (1, 3))
OPTIONS = list(
    itertools.product(
        ('class', 'global', 'none'), ('l2', 'squared_l2', 'cosine'), ('per_block', 'paper')
    )
)


def make_attentions(seed: int, dtype: torch.dtype = torch.float64) -> list[AttentionMap]:
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for grid, heads, keys in zip(GRIDS, HEADS, KEYS, strict=True):
        query = torch.randn(4, heads, grid[0] * grid[1], 3, generator=generator).to(dtype)
        key = torch.randn(4, heads, keys[0] * keys[1], 3, generator=generator).to(dtype)
        blocks.append(AttentionMap(query.requires_grad_(), key.requires_grad_(), 0.6, grid, keys))
    return blocks


def make_features(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(4, channels, *grid, generator=generator).to(dtype).requires_grad_()
        for grid, channels in zip(GRIDS, (3, 5, 6), strict=True)
    ]


MAKERS = {'attention': make_attentions, 'feature': make_features}


def make_labels() -> Tensor:
    """Four images: several classes and ignore; one small class; no class; ignore and one class."""
    labels = torch.zeros(4, 13, 11, dtype=torch.long)
    labels[0, :5, :6] = 1
    labels[0, 5:, :3] = 2
    labels[0, 8:, 6:] = 20
    labels[0, :, 5] = 255
    labels[1, 3, 2:4] = 7
    labels[1, 7:, 4:] = 3
    labels[2, :4] = 255
    labels[3] = 255
    labels[3, 3:12, 2:9] = 5
    return labels


def leaves(blocks: Sequence[AttentionMap | Tensor]) -> list[Tensor]:
    return [
        leaf
        for block in blocks
        for leaf in ((block.query, block.key) if isinstance(block, AttentionMap) else (block,))
    ]


def vectors(block: AttentionMap | Tensor) -> Tensor:
    """(B, heads, h, w, length): the block's vector at each position."""
    if isinstance(block, AttentionMap):
        dense = (block.query @ block.key.transpose(2, 3) * block.scale).softmax(-1)
        return dense.unflatten(2, block.query_hw)
    return block.permute(0, 2, 3, 1).unsqueeze(1)


def distance_of(a: Tensor, b: Tensor, distance: str) -> Tensor:
    if distance == 'cosine':
        return 1 - (a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt()
    squared = ((a - b) ** 2).sum()
    return squared if distance == 'squared_l2' else squared.sqrt()


def region_distance(
    new: Tensor, old: Tensor, inside: Tensor, pooling: str, distance: str
) -> Tensor:
    """For one image, head and region: dist of eq. (1)'s means, or the mean over positions of
    dist."""
    positions = inside.nonzero().tolist()
    if pooling == 'none':
        each = [distance_of(new[u, v], old[u, v], distance) for u, v in positions]
        return sum(each) / len(positions)
    means = [sum(block[u, v] for u, v in positions) / len(positions) for block in (new, old)]
    return distance_of(*means, distance)


def regions_of(labels: Tensor, grid: tuple[int, int], pooling: str) -> list[dict[int, Tensor]]:
    """For each image, the mask of each class on the grid."""
    if pooling != 'class':
        return [{0: torch.ones(grid, dtype=torch.bool)} for _ in labels]
    resized = F.interpolate(labels[:, None].double(), grid, mode='nearest')[:, 0].long()
    return [
        {c: image == c for c in image.unique().tolist() if c not in (0, 255)} for image in resized
    ]


def brute_force(
    student: Sequence[AttentionMap | Tensor],
    teacher: Sequence[AttentionMap | Tensor],
    labels: Tensor,
    pooling: str,
    distance: str,
    normalisation: str,
) -> Tensor:
    """Eq. (2), a loop over blocks, images, classes and heads."""
    new = [vectors(block) for block in student]
    old = [vectors(block).detach() for block in teacher]
    regions = [regions_of(labels, tuple(block.shape[2:4]), pooling) for block in new]
    total = torch.zeros((), dtype=torch.float64)
    for j, i in itertools.product(range(len(new)), range(len(labels))):
        classes = set(regions[j][i])
        if normalisation == 'paper':
            classes = set().union(*(block[i] for block in regions))
        divisor = len(new) * new[j].shape[1] if normalisation == 'per_block' else new[-1].shape[1]
        for inside in regions[j][i].values():
            for h in range(new[j].shape[1]):
                term = region_distance(new[j][i, h], old[j][i, h], inside, pooling, distance)
                total = total + term / (len(labels) * len(classes) * divisor)
    return total


@pytest.mark.parametrize(('pooling', 'distance', 'normalisation'), OPTIONS)
@pytest.mark.parametrize('source', ['attention', 'feature'])
@pytest.mark.parametrize('chunk', [37, 2**20])
def test_equals_the_loops_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    chunk: int,
    pooling: str,
    distance: str,
    normalisation: str,
) -> None:
    monkeypatch.setattr(attention_module, 'CHUNK_ELEMENTS', {'cpu': chunk})
    student, teacher, labels = MAKERS[source](0), MAKERS[source](1), make_labels()
    loss = crp_loss(
        student,
        teacher,
        labels,
        pooling=pooling,
        distance=distance,
        normalisation=normalisation,
    )
    expected = brute_force(student, teacher, labels, pooling, distance, normalisation)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    got = torch.autograd.grad(loss, leaves(student))
    want = torch.autograd.grad(expected, leaves(student))
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-9, rtol=1e-9)


def test_the_labels_are_as_hard_as_they_claim() -> None:
    labels = make_labels()
    classes = [[set(image) for image in regions_of(labels, grid, 'class')] for grid in GRIDS]
    assert classes[0][0] == {1, 2, 20}
    assert 7 in classes[0][1]  # there on the fine grid,
    assert 7 not in classes[2][1]  # gone on the coarse one
    assert all(block[2] == set() for block in classes)


@pytest.mark.parametrize('blocks', [1, 2])
def test_any_number_of_blocks(blocks: int) -> None:
    student, teacher, labels = (
        make_attentions(0)[:blocks],
        make_attentions(1)[:blocks],
        make_labels(),
    )
    expected = brute_force(student, teacher, labels, 'class', 'l2', 'per_block')
    torch.testing.assert_close(crp_loss(student, teacher, labels), expected)


def one_block(weights: list[list[float]], query_hw: tuple[int, int]) -> AttentionMap:
    """A map with the given rows: queries are their logarithms and keys the unit vectors."""
    query = torch.tensor(weights).log()[None, None]
    key = torch.eye(query.shape[3])[None, None]
    return AttentionMap(query, key, 1.0, query_hw, (1, query.shape[3]))


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        # Class 1 has rows 0 and 1, class 2 has row 2, row 3 is background.
        # Pooled differences: class 1 (0.3, -0.3), class 2 (-0.4, 0.4); over all rows (0.1, -0.1).
        ({'distance': 'squared_l2'}, (0.18 + 0.32) / 2),
        ({'distance': 'l2'}, 2**0.5 * (0.3 + 0.4) / 2),
        ({'pooling': 'global'}, 2**0.5 * 0.1),
        # Differences by row: 0.6, 0, -0.4, 0.2.
        ({'pooling': 'none'}, 2**0.5 * (0.6 + 0.4 + 0.2) / 4),
        ({'pooling': 'none', 'distance': 'squared_l2'}, 2 * (0.36 + 0.16 + 0.04) / 4),
    ],
)
def test_known_values(options: dict[str, str], expected: float) -> None:
    new = one_block([[0.8, 0.2], [0.5, 0.5], [0.3, 0.7], [0.6, 0.4]], (2, 2))
    old = one_block([[0.2, 0.8], [0.5, 0.5], [0.7, 0.3], [0.4, 0.6]], (2, 2))
    labels = torch.tensor([[[1, 1], [2, 0]]])
    assert crp_loss([new], [old], labels, **options).item() == pytest.approx(expected, abs=1e-6)


def test_an_image_without_classes_counts_among_the_images() -> None:
    new, old = (
        AttentionMap(
            block.query.expand(2, -1, -1, -1), block.key.expand(2, -1, -1, -1), 1.0, (1, 2), (1, 2)
        )
        for block in (
            one_block([[0.8, 0.2], [0.5, 0.5]], (1, 2)),
            one_block([[0.5, 0.5], [0.1, 0.9]], (1, 2)),
        )
    )
    labels = torch.tensor([[[1, 0]], [[0, 255]]])
    assert crp_loss([new], [old], labels).item() == pytest.approx(2**0.5 * 0.3 / 2, abs=1e-6)


@pytest.mark.parametrize(('pooling', 'distance', 'normalisation'), OPTIONS)
@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_identical_models_have_loss_and_gradient_zero(
    source: str, pooling: str, distance: str, normalisation: str
) -> None:
    student = MAKERS[source](0, torch.float32)
    loss = crp_loss(
        student,
        MAKERS[source](0, torch.float32),
        make_labels(),
        pooling=pooling,
        distance=distance,
        normalisation=normalisation,
    )
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves(student))


@pytest.mark.parametrize('pooling', ['class', 'global', 'none'])
@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_gradient_reaches_the_student_only(source: str, pooling: str) -> None:
    student, teacher = MAKERS[source](0), MAKERS[source](1)
    crp_loss(student, teacher, make_labels(), pooling=pooling).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves(student))
    assert all(leaf.grad is None for leaf in leaves(teacher))


@pytest.mark.parametrize('spoilt', [0, 1], ids=['student', 'teacher'])
@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_what_background_holds_does_not_come_in(source: str, spoilt: int) -> None:
    labels = make_labels()
    clean, other = ([MAKERS[source](seed) for seed in (0, 1)] for _ in range(2))
    with torch.no_grad():
        for block, grid in zip(other[spoilt], GRIDS, strict=True):
            small = F.interpolate(labels[:, None].float(), grid).flatten(1)
            outside = (small == 0) | (small == 255)
            tensor = block.query if source == 'attention' else block.flatten(2)[:, None].mT
            tensor.transpose(1, 2)[outside] = float('nan')
    losses = [crp_loss(*models, labels) for models in (clean, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for got, want in zip(leaves(other[0]), leaves(clean[0]), strict=True):
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_a_batch_without_classes_gives_zero_in_the_graph(source: str) -> None:
    student, teacher = MAKERS[source](0), MAKERS[source](1)
    loss = crp_loss(student, teacher, torch.full((4, 13, 11), 255))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves(student))


@pytest.mark.parametrize('pooling', ['class', 'global', 'none'])
@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_autocast_and_half_precision_are_computed_in_float32(source: str, pooling: str) -> None:
    labels = make_labels()
    half = [MAKERS[source](seed, torch.bfloat16) for seed in (0, 1)]
    full = [MAKERS[source](seed, torch.bfloat16) for seed in (0, 1)]
    with torch.autocast('cpu', torch.bfloat16):
        loss = crp_loss(*half, labels, pooling=pooling)
    loss.backward()
    exact = brute_force(
        *[[_double(block) for block in blocks] for blocks in full],
        labels,
        pooling,
        'l2',
        'per_block',
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(
        leaves(half[0]), torch.autograd.grad(exact, leaves(full[0])), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs, atol=1e-5, rtol=2e-2)


def _double(block: AttentionMap | Tensor) -> AttentionMap | Tensor:
    if isinstance(block, AttentionMap):
        return AttentionMap(
            block.query.double(), block.key.double(), block.scale, block.query_hw, block.key_hw
        )
    return block.double()


@pytest.mark.parametrize('pooling', ['class', 'global', 'none'])
def test_no_pooling_saves_the_dense_map(monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    monkeypatch.setattr(attention_module, 'CHUNK_ELEMENTS', {'cpu': 2000})
    generator = torch.Generator().manual_seed(0)
    new, old = (
        AttentionMap(
            torch.randn(1, 2, 400, 2, generator=generator).requires_grad_(),
            torch.randn(1, 2, 100, 2, generator=generator).requires_grad_(),
            1.0,
            (20, 20),
            (10, 10),
        )
        for _ in range(2)
    )
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        crp_loss([new], [old], torch.ones(1, 20, 20, dtype=torch.long), pooling=pooling)
    assert saved
    assert sum(saved) < 2 * 400 * 100 / 8


def test_the_head_width_of_the_old_model_may_differ() -> None:
    student, labels = make_attentions(0), make_labels()
    teacher = [
        AttentionMap(
            *(torch.cat([tensor, 0 * tensor], -1) for tensor in (block.query, block.key)),
            block.scale,
            block.query_hw,
            block.key_hw,
        )
        for block in student
    ]
    assert crp_loss(student, teacher, labels).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'pooling': 'clas'}, r"pooling='clas' is unknown \(did you mean 'class'\?\); expected one of .*'none'"),
        ({'distance': 'squared'}, r"distance='squared' is unknown \(did you mean 'squared_l2'\?\)"),
        ({'normalisation': 'xyz'}, r"normalisation='xyz' is unknown; expected .*'per_block', 'paper'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crp_loss(make_attentions(0), make_attentions(1), make_labels(), **options)
    with pytest.raises(ValueError, match=message):
        CRPDistillationLoss(**options)


@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_cosine_does_not_see_the_length_and_bears_a_vector_of_zeros(source: str) -> None:
    student = MAKERS[source](0, torch.float32)
    if source == 'feature':
        scaled = [3 * block for block in student]
        assert crp_loss(scaled, student, make_labels(), distance='cosine').item() == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            for block in student:
                block.zero_()
    loss = crp_loss(student, MAKERS[source](1, torch.float32), make_labels(), distance='cosine')
    loss.backward()
    assert 0 < loss.item() <= 2
    assert all(leaf.grad.isfinite().all() for leaf in leaves(student))
    assert max(float(leaf.grad.abs().max()) for leaf in leaves(student)) < 10


@pytest.mark.parametrize('source', ['attention', 'feature'])
def test_masked_new_classes_are_as_ignored(source: str) -> None:
    student, teacher, labels = make_output(0), make_output(1, logits=torch.zeros(4, 5, 7, 9)), make_labels()
    masked = torch.where(labels >= 5, 255, labels)
    assert not torch.equal(masked, labels)
    blocks = [output.attentions if source == 'attention' else output.features for output in (student, teacher)]
    expected = brute_force(*blocks, masked, 'class', 'l2', 'per_block')
    torch.testing.assert_close(crp_loss(*blocks, labels, num_old=5), expected, atol=1e-9, rtol=1e-9)
    module = CRPDistillationLoss(source=source, blocks=(0, 1, 2), mask_new=True)
    unprepared = module(student, teacher, labels)
    module.prepare(teacher, labels, 21)
    for loss in (unprepared, module(student, teacher, labels)):
        torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    # With all classes left out there is nothing to transfer.
    assert crp_loss(*blocks, labels, num_old=1).item() == 0


def test_new_classes_cannot_be_left_out_where_there_are_no_regions() -> None:
    message = r"new classes can be left out with pooling='class' alone, got pooling='global'"
    with pytest.raises(ValueError, match=message):
        CRPDistillationLoss(pooling='global', mask_new=True)
    with pytest.raises(ValueError, match=message):
        crp_loss(make_attentions(0), make_attentions(1), make_labels(), pooling='global', num_old=5)


def test_blocks_that_cannot_be_compared_are_refused() -> None:
    attentions, features, labels = make_attentions(0), make_features(0), make_labels()
    with pytest.raises(ValueError, match='3 and 2'):
        crp_loss(attentions, attentions[:2], labels)
    with pytest.raises(ValueError, match='0 and 0'):
        crp_loss([], [], labels)
    with pytest.raises(ValueError, match=r'block 0.*\(4, 1, 63, 6\).*\(4, 4, 20, 4\)'):
        crp_loss(attentions, attentions[::-1][1:] + attentions[:1], labels)
    with pytest.raises(ValueError, match=r'block 1.*\(4, 5, 5, 4\).*\(4, 6, 2, 3\)'):
        crp_loss(features, [features[0], features[2], features[1]], labels)
    with pytest.raises(ValueError, match=r'block 0.*attention.*features'):
        crp_loss(attentions, features, labels)
    with pytest.raises(ValueError, match=r'block 0: 4 images.*\(2, 13, 11\)'):
        crp_loss(attentions, attentions, labels[:2])
    with pytest.raises(ValueError, match=r'integers.*float32'):
        crp_loss(attentions, attentions, labels.float())
    with pytest.raises(ValueError, match=r'\(4, 1, 13, 11\)'):
        crp_loss(attentions, attentions, labels[:, None])


def make_output(seed: int, **changes: Any) -> SegmentorOutput:
    parts = {
        'logits': torch.zeros(4, 21, 7, 9),
        'features': tuple(make_features(seed)),
        'attentions': tuple(make_attentions(seed)),
    }
    return SegmentorOutput(**parts | changes)


@pytest.mark.parametrize('source', ['attention', 'feature', 'both'])
def test_module_weighs_the_loss_of_its_sources_and_blocks(source: str) -> None:
    module = MODELS.build(
        {'type': 'CRPDistillationLoss', 'source': source, 'blocks': (0, 2), 'loss_weight': 20.0}
    )
    student, teacher, labels = make_output(0), make_output(1), make_labels()
    expected = {
        'attention': crp_loss(student.attentions[::2], teacher.attentions[::2], labels),
        'feature': crp_loss(student.features[::2], teacher.features[::2], labels),
    }
    expected['both'] = expected['attention'] + expected['feature']
    torch.testing.assert_close(module(student, teacher, labels), 20 * expected[source])
    assert module.needs_attention == (source != 'feature')


def test_module_passes_its_options_on() -> None:
    options = {
        'pooling': 'global',
        'distance': 'squared_l2',
        'normalisation': 'paper',
        'ignore_index': 3,
    }
    student, teacher, labels = make_output(0), make_output(1), make_labels()
    loss = CRPDistillationLoss(**options, blocks=(0, 1, 2))(student, teacher, labels)
    torch.testing.assert_close(
        loss, crp_loss(student.attentions, teacher.attentions, labels, **options)
    )
    options['pooling'] = 'class'
    loss = CRPDistillationLoss(**options, blocks=(0, 1, 2))(student, teacher, labels)
    torch.testing.assert_close(
        loss, crp_loss(student.attentions, teacher.attentions, labels, **options)
    )


@pytest.mark.parametrize('source', ['attention', 'both'])
@pytest.mark.parametrize('pooling', ['class', 'global', 'none'])
def test_preparing_changes_when_regions_are_found_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, source: str, pooling: str
) -> None:
    student, teacher, labels = make_output(0), make_output(1), make_labels()
    module = CRPDistillationLoss(source=source, pooling=pooling, blocks=(0, 1, 2))
    expected = module(student, teacher, labels)
    other = module(student, teacher, labels.clamp(max=1))
    calls = []
    find = region_distances.find_regions_on_grids

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return find(*args, **kwargs)

    monkeypatch.setattr(region_distances, 'find_regions_on_grids', watched)
    module.prepare(teacher, labels, 21)
    found = len(calls)
    assert torch.equal(module(student, teacher, labels), expected)
    assert len(calls) == found if pooling == 'class' else found == 0
    # What was prepared for other labels is not used, nor twice.
    module.prepare(teacher, labels, 21)
    assert torch.equal(module(student, teacher, labels.clamp(max=1)), other)
    assert torch.equal(module(student, teacher, labels), expected)


def test_labels_may_be_beyond_a_byte_and_the_old_models_classes() -> None:
    student, teacher = (
        make_output(seed, logits=torch.zeros(4, channels, 7, 9))
        for seed, channels in ((0, 300), (1, 250))
    )
    labels = make_labels()
    few, many = labels.masked_fill(labels == 5, 21), labels.masked_fill(labels == 5, 290)
    module = CRPDistillationLoss(blocks=(0, 1, 2))
    expected = module(student, teacher, few)
    module.prepare(teacher, many, 300)
    assert torch.equal(module(student, teacher, many), expected)


def test_module_refuses_what_cannot_work() -> None:
    student, labels = make_output(0), make_labels()
    with pytest.raises(ValueError, match='forward_with_attention'):
        CRPDistillationLoss(blocks=(0,))(student, make_output(1, attentions=()), labels)
    with pytest.raises(ValueError, match='the student has only 3 blocks, 0 to 2'):
        CRPDistillationLoss()(student, student, labels)
    with pytest.raises(ValueError, match=r"source='features' is unknown \(did you mean 'feature'\?\)"):
        CRPDistillationLoss(source='features')
    for blocks in ((), (-1, 0), (1, 1)):
        with pytest.raises(ValueError, match='blocks must be different indices'):
            CRPDistillationLoss(blocks=blocks)


@pytest.mark.parametrize('align_corners', [True, False])
def test_output_is_resized_once_per_size(align_corners: bool) -> None:
    logits = torch.randn(1, 2, 3, 4).requires_grad_()
    output = SegmentorOutput(logits, (), align_corners=align_corners)
    resized = output.resized((6, 7))
    expected = F.interpolate(logits, (6, 7), mode='bilinear', align_corners=align_corners)
    torch.testing.assert_close(resized, expected)
    assert output.resized(torch.Size([6, 7])) is resized
    assert output.resized((7, 6)).shape == (1, 2, 7, 6)
    assert output.resized((3, 4)) is logits


def test_output_resized_without_a_graph_is_not_given_to_a_loss() -> None:
    output = SegmentorOutput(torch.randn(1, 2, 3, 4).requires_grad_(), ())
    with torch.no_grad():
        assert not output.resized((6, 7)).requires_grad
    assert output.resized((6, 7)).requires_grad
