# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Pixel-wise losses in one pass, a few rows at a time: the same numbers as each loss alone."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmseg.models import CrossEntropyLoss, FCNHead
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmseg_sats.functional import resizing
from mmseg_sats.functional.pixels.per_pixel import PixelChunk, per_pixel_losses, reduced_losses
from mmseg_sats.functional.resizing import ResizedLogits
from mmseg_sats.models.losses import (
    KnowledgeDistillationLoss,
    LabelGuidedDistillationLoss,
    SelfEntropyLoss,
    UnbiasedCrossEntropyLoss,
    UnbiasedDistillationLoss,
)
from mmseg_sats.models.pixel_losses.base import PixelwiseDistillationLoss
from mmseg_sats.models.pixel_losses.shared import check_targets, shared_losses
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.pseudo_labels.entropy import EntropyPseudoLabeler
from mmseg_sats.models.segmentor_output import SegmentorOutput
from tests.small_models import CROSS_ENTROPY, samples
from tests.tensors import random_labels, random_tensor

SIZE = (22, 30)
PLAIN = [CROSS_ENTROPY, dict(type='UnbiasedCrossEntropyLoss', num_old=3, loss_weight=2.0)]


@pytest.fixture(autouse=True, params=[1, 4000, 10**6], ids=['rows', 'chunks', 'whole'])
def piece_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resizing.CHUNK_ELEMENTS, 'cpu', request.param)
    monkeypatch.setitem(resizing.TILE_ELEMENTS, 'cpu', 3 * request.param)
    monkeypatch.setitem(resizing.AXIS_POSITIONS, 'cpu', 7)


def outputs(align_corners: bool = False) -> tuple[SegmentorOutput, SegmentorOutput, Tensor]:
    student = random_tensor(3, 6, 7, 9).requires_grad_()
    teacher = random_tensor(3, 4, 7, 9, seed=1)
    made = [SegmentorOutput(x, (), align_corners=align_corners) for x in (student, teacher)]
    return *made, random_labels(3, *SIZE, classes=6)


def head(**options: Any) -> FCNHead:
    cfg: dict[str, Any] = dict(
        in_channels=4, channels=4, in_index=0, num_convs=0, concat_input=False, num_classes=6,
        loss_decode=CROSS_ENTROPY, align_corners=False,
    )
    return FCNHead(**ConfigDict(cfg | options))


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('old', 'new'), [
    ((7, 9), SIZE), ((5, 8), (5, 8)), ((16, 16), (64, 64)), ((9, 12), (4, 5)),
    ((5, 8), (5, 16)), ((5, 8), (10, 8)),  # one side keeps its size
])
def test_rows_and_their_adjoint_are_those_of_interpolate(
    old: tuple[int, int], new: tuple[int, int], align_corners: bool
) -> None:
    logits = random_tensor(2, 5, *old).requires_grad_()
    expected = F.interpolate(logits, new, mode='bilinear', align_corners=align_corners)
    grad = random_tensor(*expected.shape, seed=1)
    resized = ResizedLogits(logits.detach(), new, align_corners)
    found, total = torch.empty_like(expected), resized.zeros()
    for index in resized.tiles():
        tile = resized.tile(index)
        for rows in resized.chunks(index):
            # (n, K, h, w), whether n is of images or of one image's rows
            at, own = (view[index[0]][..., rows, :] for view in (found, grad))
            if at.dim() == 3:
                at, own = (view.transpose(0, 1).unsqueeze(2) for view in (at, own))
            at.copy_(tile.rows(rows).view(at.shape))
            tile.add_gradient(own.flatten(2), rows)
        tile.give_gradient(total)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (adjoint,) = torch.autograd.grad(expected, logits, grad)
    torch.testing.assert_close(total, adjoint, rtol=0, atol=1e-11)


def test_a_class_that_is_masked_out_of_logits_of_the_labels_size_has_no_part() -> None:
    logits = random_tensor(2, 5, 40, 30)
    logits[:, 4] = -torch.inf
    logits.requires_grad_()
    labels = random_labels(2, 40, 30, classes=4).clamp(max=3)
    (found,) = per_pixel_losses([lambda chunk: -chunk.log_p.gather(1, chunk.targets)[:, 0]], logits, None, labels)
    expected = F.cross_entropy(logits, labels, reduction='none')
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected)))


@pytest.mark.parametrize('align_corners', [False, True])
def test_shared_losses_are_those_of_head_and_parts(align_corners: bool) -> None:
    student, teacher, labels = outputs(align_corners)
    own = head(loss_decode=PLAIN, align_corners=align_corners)
    parts = torch.nn.ModuleDict(
        {
            'output': UnbiasedDistillationLoss(20.0),
            'lwf': KnowledgeDistillationLoss(3.0),
            'guided': LabelGuidedDistillationLoss(20.0, new_weight=0.5),
            'entropy': SelfEntropyLoss(0.5),
        }
    )
    found = shared_losses(own, parts, student, teacher, labels)
    expected = {f'decode.{name}': value for name, value in
                own.loss_by_feat(student.logits, samples(labels)).items()}
    resized = [SegmentorOutput(output.resized(SIZE), ()) for output in (student, teacher)]
    expected |= {f'loss_{name}': part(*resized, labels) for name, part in parts.items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-12, check_dtype=False)
    # Each term by itself: a gradient that is not the sum's reaches the right losses.
    for factors in ([1, 1, 1, 1, 1], [0.5, 3, -1, -2, 2], [0, 1, 0, 0, 0]):
        sums = [
            sum(factor * losses[name] for factor, name in
                zip(factors, ['decode.loss_ce', *(f'loss_{name}' for name in parts)], strict=True))
            for losses in (found, expected)
        ]
        gradients = [torch.autograd.grad(total, student.logits, retain_graph=True)[0] for total in sums]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert not found['decode.acc_seg'].requires_grad


class Counted(PixelwiseDistillationLoss):
    """A distillation that counts the pixels that it is computed for."""

    pixels = 0

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        self.pixels += chunk.labels.numel()
        return (chunk.student[:, :4] - chunk.teacher).square().sum(1)


@pytest.mark.parametrize(('factors', 'passes'), [
    ((1, 1), 1), ((0.3, 0.3), 1), ((-2**12, -2**12), 1), ((0, 0), 1), ((1, 2), 2), ((0, 1), 2), ((1, None), 2),
])
@pytest.mark.parametrize('weighted', [False, True])
def test_a_multiple_of_the_sum_takes_one_pass_and_another_gradient_one_more(
    factors: tuple[float, float | None], passes: int, weighted: bool
) -> None:
    student, teacher, labels = outputs()
    part = Counted(0.7)
    weights = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64) if weighted else None
    losses = shared_losses(head(), {'counted': part}, student, teacher, labels, weights)
    asked = [(losses[name], factor) for name, factor in
             zip(('decode.loss_ce', 'loss_counted'), factors, strict=True) if factor is not None]
    (found,) = torch.autograd.grad(sum(factor * loss for loss, factor in asked), student.logits)
    # A loss that backward does not ask for is not computed again.
    assert part.pixels == labels.numel() * (1 if factors[1] is None else passes)
    pixels = F.cross_entropy(student.resized(SIZE), labels, ignore_index=255, reduction='none')
    cross_entropy = (pixels if weights is None else pixels * weights[:, None, None]).mean()
    distance = (student.resized(SIZE)[:, :4] - teacher.resized(SIZE)).square().sum(1).mean()
    total = factors[0] * cross_entropy + (factors[1] or 0) * 0.7 * distance
    torch.testing.assert_close(found, torch.autograd.grad(total, student.logits)[0])


def test_a_loss_that_weighs_nothing_costs_no_second_pass() -> None:
    student, teacher, labels = outputs()
    part = Counted()
    losses = shared_losses(
        head(loss_decode=CROSS_ENTROPY | dict(loss_weight=0.0)), {'counted': part}, student, teacher, labels
    )
    sum(losses[name] for name in ('decode.loss_ce', 'loss_counted')).backward()
    assert part.pixels == labels.numel()


def test_checkpointing_computes_the_losses_once_more_and_no_more_than_that() -> None:
    student, teacher, labels = outputs()
    part = Counted()
    expected = torch.autograd.grad(part(student, teacher, labels), student.logits)
    part.pixels = 0

    def loss(logits: Tensor) -> Tensor:
        return part(SegmentorOutput(logits, ()), teacher, labels)

    found = torch.autograd.grad(checkpoint(loss, student.logits, use_reentrant=False), student.logits)
    assert part.pixels == 2 * labels.numel()
    torch.testing.assert_close(found, expected)


class Watched(Counted):
    """A distillation that notes the chunks' logits without keeping them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref] = []

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        self.seen.append(weakref.ref(chunk.student))
        return super().per_pixel(chunk)


@pytest.mark.parametrize('factor', [1, 2])  # in one pass, in two
def test_nothing_of_a_chunk_outlives_it(factor: int) -> None:
    student, teacher, labels = outputs()
    part = Watched()
    gc.disable()  # which would free cycles, but late
    try:
        losses = shared_losses(head(), {'watched': part}, student, teacher, labels)
        (losses['decode.loss_ce'] + factor * losses['loss_watched']).backward()
        assert part.seen
        assert not any(reference() is not None for reference in part.seen)
    finally:
        gc.enable()


def test_a_batch_without_images_has_an_empty_gradient() -> None:
    logits = random_tensor(0, 6, 7, 9).requires_grad_()
    loss = reduced_losses(
        lambda maps: {'loss': maps[0].sum()}, [lambda chunk: chunk.log_p.sum(1)], logits, None,
        torch.zeros(0, *SIZE, dtype=torch.long),
    )['loss']  # fmt: skip
    loss.backward()
    assert logits.grad.shape == logits.shape


def test_without_gradients_none_is_computed() -> None:
    student, teacher, labels = outputs()
    part = Counted()
    with torch.no_grad():
        assert not shared_losses(head(), {'counted': part}, student, teacher, labels)['loss_counted'].requires_grad
    assert part.pixels == labels.numel()


def test_weights_of_images_are_factors_of_the_heads_losses() -> None:
    student, teacher, labels = outputs()
    weights = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    found = shared_losses(head(), {}, student, teacher, labels, weights)
    pixels = F.cross_entropy(student.resized(SIZE), labels, ignore_index=255, reduction='none')
    expected = (pixels * weights[:, None, None]).mean()
    torch.testing.assert_close(found['decode.loss_ce'], expected)
    gradients = [torch.autograd.grad(loss, student.logits)[0]
                 for loss in (found['decode.loss_ce'], expected)]
    torch.testing.assert_close(*gradients)


class OwnLoss(CrossEntropyLoss):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*args, **options)


class OwnHead(FCNHead):
    def loss_by_feat(self, *args: Any) -> dict[str, Tensor]:
        return super().loss_by_feat(*args)


@pytest.mark.parametrize('options', [
    dict(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=8)),
    dict(loss_decode=[CROSS_ENTROPY, dict(type='DiceLoss')]),
    dict(loss_decode=CROSS_ENTROPY | dict(avg_non_ignore=True)),
    dict(loss_decode=CROSS_ENTROPY | dict(class_weight=[1.0] * 5 + [2.0])),
    dict(loss_decode=CROSS_ENTROPY | dict(reduction='sum')),
    dict(loss_decode=CROSS_ENTROPY | dict(use_sigmoid=True)),
])
def test_heads_of_another_kind_keep_their_own_way(options: dict[str, Any]) -> None:
    student, teacher, labels = outputs()
    parts = {'output': UnbiasedDistillationLoss()}
    assert set(shared_losses(head(**options), parts, student, teacher, labels)) == {'loss_output'}
    assert shared_losses(head(**options), {}, student, None, labels) == {}


def test_a_head_with_a_loss_of_its_own_and_an_unknown_class_keep_their_own_way() -> None:
    student, teacher, labels = outputs()
    own = head()
    own.__class__ = OwnHead
    assert shared_losses(own, {}, student, teacher, labels) == {}
    own = head()
    own.loss_decode = OwnLoss()
    assert shared_losses(own, {}, student, teacher, labels) == {}
    student.unknown = random_tensor(3, 1, 7, 9)
    assert shared_losses(head(), {}, student, teacher, labels) == {}


class Doubt(PixelwiseDistillationLoss):
    """The new model's own entropy: a part that needs no old model."""

    needs_teacher = False

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        return -(chunk.log_p.exp() * chunk.log_p).sum(1)


def test_a_part_that_needs_no_old_model_runs_without_one() -> None:
    student, _, labels = outputs()
    losses = shared_losses(head(), dict(doubt=Doubt()), student, None, labels)
    log_p = F.log_softmax(F.interpolate(student.logits, SIZE, mode='bilinear'), 1)
    expected = -(log_p.exp() * log_p).sum(1).mean()
    torch.testing.assert_close(losses['loss_doubt'], expected)
    torch.testing.assert_close(Doubt()(student, None, labels), expected)


def test_a_label_without_a_channel_is_named() -> None:
    *_, labels = outputs()
    check_targets(head(), labels, 6)
    with pytest.raises(ValueError, match=r'0\.\.5 .* got \[7\]'):
        check_targets(head(), labels.masked_fill(labels == 2, 7), 6)
    check_targets(head(ignore_index=7), labels.masked_fill(labels == 255, 7), 6)


@pytest.mark.parametrize('loss', [CROSS_ENTROPY, dict(type='OneVsRestLoss')], ids=lambda loss: loss['type'])
def test_a_heads_own_ignore_index_is_heeded(loss: dict[str, Any]) -> None:
    student, _, labels = outputs()
    own = head(ignore_index=3, loss_decode=loss)
    labels = labels.masked_fill(labels == 255, 3)
    found = shared_losses(own, {}, student, None, labels)
    for name, value in own.loss_by_feat(student.logits, samples(labels)).items():
        torch.testing.assert_close(found[f'decode.{name}'], value, check_dtype=False)


def test_what_does_not_fit_the_logits_is_named() -> None:
    student, teacher, labels = outputs()
    with pytest.raises(ValueError, match='at least the channels of the teacher'):
        shared_losses(head(), dict(kd=UnbiasedDistillationLoss()), teacher, student, labels)
    own = head(loss_decode=dict(type='UnbiasedCrossEntropyLoss', num_old=7))
    with pytest.raises(ValueError, match='num_old=7 for logits of K=6'):
        shared_losses(own, {}, student, None, labels)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, labels = outputs()
    low = student.logits.detach().bfloat16().requires_grad_()
    losses = [UnbiasedCrossEntropyLoss(2).per_pixel, UnbiasedDistillationLoss().per_pixel]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = per_pixel_losses(losses, low, teacher.logits.bfloat16(), labels)
    exact = low.detach().double().requires_grad_()
    expected = per_pixel_losses(losses, exact, teacher.logits.bfloat16().double(), labels)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(sum(m.mean() for m in maps), x)[0]
                 for maps, x in ((found, low), (expected, exact))]
    assert gradients[0].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=0.01, atol=1e-7)


@pytest.mark.parametrize('inside', [False, True])
def test_backward_is_of_full_precision_inside_autocast_and_behind_it(inside: bool) -> None:
    student, _, labels = outputs()
    found = []
    for dtype in (torch.float32, torch.float64):
        logits = student.logits.detach().to(dtype).requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.float32):
            (values,) = per_pixel_losses([UnbiasedCrossEntropyLoss(2).per_pixel], logits, None, labels)
            loss = values.sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append((values.detach().double(), logits.grad.double()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_logits_resized_without_a_graph_are_not_handed_out_where_one_is_wanted() -> None:
    student, *_ = outputs()
    with torch.no_grad():
        assert not student.resized(SIZE).requires_grad
    assert student.resized(SIZE).requires_grad


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('unknown', [False, True])
def test_labels_in_pieces_are_those_of_the_whole(unknown: bool, align_corners: bool) -> None:
    student, teacher, labels = outputs(align_corners)
    if unknown:
        teacher.unknown = random_tensor(3, 1, 7, 9, seed=2)
    data_samples = samples(labels)
    data_samples[1].set_metainfo(dict(source='memory'))
    labeler = EntropyPseudoLabeler()
    labeler.thresholds = torch.tensor([0.2, 0.3, 0.4, 0.5])
    found, _ = complete_labels(labels, data_samples, {'stage': labeler}, student, teacher)
    expected = labeler(labels, teacher.labelling_logits(SIZE))
    expected[1] = labels[1]
    assert torch.equal(found, expected)
    assert not torch.equal(found, labels)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_pixels_and_classes_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resizing.CHUNK_ELEMENTS, 'cpu', 1000)
    monkeypatch.setitem(resizing.TILE_ELEMENTS, 'cpu', 2000)
    student, teacher, labels = outputs()
    labeler = EntropyPseudoLabeler(threshold=0.5)
    with LargestTensor() as largest:
        completed, _ = complete_labels(labels, samples(labels), {'stage': labeler}, student, teacher)
        losses = shared_losses(
            head(), {'output': UnbiasedDistillationLoss()}, student, teacher, completed)
        (losses['decode.loss_ce'] + losses['loss_output']).backward()
    # The maps of losses and labels have 3 * 22 * 30 = 1980 entries.
    assert largest.elements < 4 * labels.numel() / 2


def test_neighbours_are_taken_together_and_no_more_than_are_allowed() -> None:
    slices = list(resizing._consecutive([0, 1, 2, 5, 6, 9], longest=2))
    assert slices == [slice(0, 2), slice(2, 3), slice(5, 7), slice(9, 10)]
