# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which pixels are labelled by whom: the labelers against loops, and the segmentor by source."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_sats.functional import fused_labels
from mmseg_sats.models.losses import SelfEntropyLoss, self_entropy
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.pseudo_labels.old_model import FusedPseudoLabeler, OldModelPseudoLabeler
from mmseg_sats.models.segmentor_output import SegmentorOutput
from tests.small_models import build, images, model_cfg, samples, save_weights

NUM_OLD, NUM_ALL = 4, 6


def logits(channels: int, seed: int, batch: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def fused_by_hand(teacher: Tensor, student: Tensor) -> Tensor:
    """The rule of the docstring, pixel by pixel."""
    result = torch.zeros(len(teacher), *teacher.shape[2:], dtype=torch.long)
    for b, y, x in (result == 0).nonzero().tolist():
        q, p = teacher[b, :, y, x].softmax(0).tolist(), student[b, :, y, x].softmax(0).tolist()
        old = max(range(NUM_OLD), key=q.__getitem__)
        p_background = sum(p[:NUM_OLD])
        new = max(range(NUM_OLD, NUM_ALL), key=p.__getitem__)
        new_says_class = p[new] > p_background
        if not new_says_class:
            label = old
        elif old == 0:
            label = new
        else:
            label = old if q[old] >= p[new] else new
        result[b, y, x] = label
    return result


@pytest.mark.parametrize('seed', range(3))
def test_fusion_against_a_loop(seed: int) -> None:
    teacher, student = logits(NUM_OLD, seed), logits(NUM_ALL, seed + 100)
    student[:, NUM_OLD:] += 2  # so that all cases come up
    expected = fused_by_hand(teacher, student)
    assert torch.equal(fused_labels(teacher, student), expected)
    assert set(expected.unique().tolist()) == set(range(NUM_ALL))


def one_pixel(*values: float) -> Tensor:
    return torch.tensor(values).log().view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ('old', 'new', 'label'),
    [
        # Two old channels (background, a), three of the new model (background, a, b).
        ((0.9, 0.1), (0.8, 0.1, 0.1), 0),
        ((0.9, 0.1), (0.2, 0.1, 0.7), 2),
        ((0.3, 0.7), (0.8, 0.1, 0.1), 1),
        ((0.3, 0.7), (0.2, 0.0, 0.8), 2),  # conflict: the new model is surer
        ((0.1, 0.9), (0.2, 0.0, 0.8), 1),  # conflict: the old one is
        ((0.0, 1.0), (0.0, 0.0, 1.0), 1),  # conflict: both are as sure
        ((0.1, 0.9), (0.3, 0.3, 0.4), 1),  # background and a together are the new model's background
    ],
)
def test_fusion_known_answers(old: tuple, new: tuple, label: int) -> None:
    assert fused_labels(one_pixel(*old), one_pixel(*new)).item() == label


def test_fusion_wants_the_old_channels_first() -> None:
    with pytest.raises(ValueError, match='K >= K_old'):
        fused_labels(logits(4, 0), logits(3, 0))
    with pytest.raises(ValueError, match='expected'):
        fused_labels(logits(4, 0), logits(6, 0, size=4))


def test_only_background_is_filled() -> None:
    labels = torch.tensor([[[0, 5, 255, 0]]])
    teacher = torch.zeros(1, 4, 1, 4)
    teacher[0, 2] = 9.0
    student = torch.zeros(1, 6, 1, 4)
    kept = labels.clone()
    assert OldModelPseudoLabeler()(labels, teacher).tolist() == [[[2, 5, 255, 2]]]
    student[0, 4, 0, 3] = 99.0
    assert FusedPseudoLabeler()(labels, teacher, student).tolist() == [[[2, 5, 255, 4]]]
    assert torch.equal(labels, kept)


# Who is asked about which image


class Constant:
    """Labels background with one number and notes what it was asked."""

    def __init__(self, label: int, needs_student: bool = False) -> None:
        self.label, self.needs_student, self.asked = label, needs_student, []

    def __call__(self, labels: Tensor, *logits: Tensor) -> Tensor:
        self.asked.append((labels.shape[0], [x.shape[1] for x in logits]))
        assert not any(x.requires_grad for x in logits)
        return torch.where(labels == 0, self.label, labels)


def of_sources(*sources: str | None) -> list[SegDataSample]:
    return [
        SegDataSample(metainfo={} if source is None else dict(source=source)) for source in sources
    ]


def outputs() -> tuple[SegmentorOutput, SegmentorOutput]:
    student = logits(NUM_ALL, 0, batch=4, size=4).requires_grad_()
    return SegmentorOutput(student, ()), SegmentorOutput(logits(NUM_OLD, 1, batch=4, size=4), ())


def test_each_labeler_sees_the_images_of_its_source() -> None:
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    labels[:, 0] = 5
    own, outside = Constant(1), Constant(2, needs_student=True)
    completed, weights = complete_labels(
        labels, of_sources('memory', None, 'outside', 'stage'), dict(stage=own, outside=outside),
        *outputs(),
    )  # fmt: skip
    assert weights is None
    assert completed[:, 0].unique().tolist() == [5]
    assert [image.unique().tolist() for image in completed[:, 1:]] == [[0], [1], [2], [1]]
    assert own.asked == [(2, [NUM_OLD])]
    assert outside.asked == [(1, [NUM_OLD, NUM_ALL])]
    assert labels[:, 1:].unique().tolist() == [0]


def test_exemplars_alone_are_not_touched() -> None:
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    own = Constant(1)
    completed, weights = complete_labels(
        labels, of_sources(*['memory'] * 4), dict(stage=own), *outputs()
    )
    assert completed is labels
    assert weights is None
    assert own.asked == []


class Weighing(Constant):
    """Gives its k-th image the weight k / 10."""

    def image_weights(self, labels: Tensor, completed: Tensor) -> Tensor:
        assert (completed[labels == 0] == self.label).all()
        return torch.arange(len(labels)) / 10


def test_only_images_that_a_labeler_has_seen_get_its_weight() -> None:
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    sources = of_sources('stage', 'memory', 'stage', 'outside')
    _, weights = complete_labels(labels, sources, dict(stage=Weighing(1)), *outputs())
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 0.1, 1.0]))


def test_two_labelers_that_weigh_keep_each_others_weights() -> None:
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    sources = of_sources('stage', 'outside', 'outside', 'stage')
    _, weights = complete_labels(labels, sources, dict(stage=Weighing(1), outside=Weighing(2)), *outputs())
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 0.1, 0.1]))


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('old') / 'snapshot.pth'
    return save_weights(build(model_cfg(NUM_OLD)), path)


def later_stage(snapshot: str, **parts: Any) -> Any:
    old_model = dict(checkpoint=snapshot, num_old=NUM_OLD)
    return build(model_cfg(NUM_ALL, old_model=old_model, **parts), seed=1).eval()


def test_the_segmentor_leaves_exemplars_to_their_labels(snapshot: str) -> None:
    """A batch of an exemplar and a stage image has the mean of the losses on true and on pseudo-labels."""
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, :20] = NUM_OLD
    x = images()
    labeler = dict(type='OldModelPseudoLabeler')
    with_labels, without = later_stage(snapshot, pseudo_labeler=labeler), later_stage(snapshot)

    def loss(model: Any, at: slice, *sources: str) -> Tensor:
        batch = samples(labels[at])
        for sample, source in zip(batch, sources, strict=True):
            sample.set_metainfo(dict(source=source))
        return model.loss(x[at], batch)['decode.loss_ce']

    exemplar = loss(without, slice(0, 1), 'memory')
    own = loss(with_labels, slice(1, 2), 'stage')
    both = loss(with_labels, slice(0, 2), 'memory', 'stage')
    torch.testing.assert_close(both, (exemplar + own) / 2, rtol=1e-5, atol=1e-5)
    assert (loss(without, slice(1, 2), 'stage') - own).abs() > 1e-3


def test_outside_images_are_labelled_without_a_pseudo_labeler(snapshot: str) -> None:
    model = later_stage(snapshot, outside_labeler=dict(type='FusedPseudoLabeler'))
    with torch.no_grad():
        model.decode_head.conv_seg.bias[NUM_OLD] += 1
    batch = samples(torch.zeros(2, 64, 64, dtype=torch.long))
    batch[1].set_metainfo(dict(source='outside'))
    found = model.loss(images(), batch)['decode.loss_ce']
    with torch.no_grad():
        student = F.interpolate(model(images(), mode='tensor'), (64, 64), mode='bilinear')
        teacher = model.old_model(images()).resized((64, 64))
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[1] = fused_labels(teacher[1:], student[1:])[0]
    assert (labels[1] == NUM_OLD).any()  # the new model says it
    assert ((labels[1] > 0) & (labels[1] < NUM_OLD)).any()  # the old one does
    torch.testing.assert_close(found, F.cross_entropy(student, labels), rtol=1e-4, atol=1e-5)


# Self-entropy


def test_self_entropy_against_a_loop() -> None:
    x = logits(NUM_ALL, 3, batch=2, size=3).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for pixel in x.permute(0, 2, 3, 1).reshape(-1, NUM_ALL):
        p = pixel.exp() / pixel.exp().sum()
        for value in p:
            total = total - value * value.log() / 18
    found = self_entropy(x)
    torch.testing.assert_close(found, total)
    (expected,) = torch.autograd.grad(total, x)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, expected)


def test_self_entropy_is_largest_where_nothing_is_known() -> None:
    assert self_entropy(torch.zeros(1, 6, 2, 2)).item() == pytest.approx(math.log(6))
    sure = torch.zeros(1, 6, 2, 2)
    sure[:, 0] = 60.0
    assert self_entropy(sure).item() == pytest.approx(0, abs=1e-6)


def test_its_loss_falls_as_predictions_become_smoother() -> None:
    student, teacher = outputs()
    labels = torch.zeros(4, 4, 4, dtype=torch.long)
    loss = SelfEntropyLoss(0.5)(student, teacher, labels)
    torch.testing.assert_close(loss, -0.5 * self_entropy(student.logits))
    (gradient,) = torch.autograd.grad(loss, student.logits)
    smoother = SegmentorOutput(student.logits.detach() - gradient, ())
    assert SelfEntropyLoss(0.5)(smoother, teacher, labels) < loss


def test_the_methods_parts_are_registered(snapshot: str, tmp_path: Path) -> None:
    model = later_stage(
        snapshot,
        pseudo_labeler=dict(type='OldModelPseudoLabeler'),
        outside_labeler=dict(type='FusedPseudoLabeler'),
        distillation=dict(entropy=dict(type='SelfEntropyLoss')),
    )
    losses = model.loss(images(), samples(torch.zeros(2, 64, 64, dtype=torch.long)))
    assert losses['loss_entropy'] < 0
    assert set(model.state_dict()) == set(later_stage(snapshot).state_dict())
