# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""SDR's losses against loops written from their formulas, and what they must not mix up."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from mmseg_sats.functional import (
    prototype_attraction,
    prototype_matching,
    repulsion,
    sparsity,
)
from mmseg_sats.models.losses import (
    PrototypeAttractionLoss,
    PrototypeMatchingLoss,
    RepulsionLoss,
    SparsityLoss,
)
from mmseg_sats.models.prototypes import ClassPrototypes
from mmseg_sats.models.segmentor_output import SegmentorOutput
from tests.small_models import build, images, model_cfg, samples

BATCH, CHANNELS, CLASSES = 2, 3, 5
KNOWN = torch.tensor([False, True, True, False, True])
PROTOTYPES = torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(9)).double()


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (2, 3, 4, 5), of both signs, and labels (2, 8, 10) with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(BATCH, CHANNELS, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, CLASSES + 1, (BATCH, 8, 10), generator=generator).clamp(min=0)
    return features, torch.where(labels == CLASSES, 255, labels)


def vectors(features: Tensor, labels: Tensor) -> dict[int, list[list[Tensor]]]:
    """The features of each class, pixel by pixel and channel by channel; nearest neighbour by hand."""
    found: dict[int, list[list[Tensor]]] = {}
    scale = labels.shape[1] // features.shape[2]
    for n in range(features.shape[0]):
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                c = int(labels[n, scale * row, scale * column])
                if c != 255:
                    own = [features[n, k, row, column] for k in range(features.shape[1])]
                    found.setdefault(c, []).append(own)
    return found


def matching_loop(features: Tensor, labels: Tensor) -> Tensor:
    terms = []
    for c, own in vectors(features, labels).items():
        if KNOWN[c]:
            means = [sum(f[k] for f in own) / len(own) for k in range(CHANNELS)]
            terms.append(sum((means[k] - PROTOTYPES[c, k]) ** 2 for k in range(CHANNELS)) / CHANNELS)
    return sum(terms) / len(terms)


def attraction_loop(features: Tensor, labels: Tensor) -> Tensor:
    terms = []
    for c, own in vectors(features, labels).items():
        if KNOWN[c]:
            squares = [(f[k] - PROTOTYPES[c, k]) ** 2 for f in own for k in range(CHANNELS)]
            terms.append(sum(squares) / len(squares))
    return sum(terms) / len(terms)


def repulsion_loop(features: Tensor, labels: Tensor) -> Tensor:
    means = [
        [sum(f[k] for f in own) / len(own) for k in range(CHANNELS)]
        for own in vectors(features, labels).values()
    ]
    terms = []
    for i, one in enumerate(means):
        for j, other in enumerate(means):
            if i != j:
                terms.append(1 / sum((one[k] - other[k]) ** 2 for k in range(CHANNELS)).sqrt())
    return sum(terms) / len(terms)


def sparsity_loop(features: Tensor, labels: Tensor) -> Tensor:
    terms = []
    for own in vectors(features, labels).values():
        own = [[value.clamp(min=0) for value in f] for f in own]
        largest = max((value for f in own for value in f), key=float)
        for f in own:
            if sum(f) > 0:
                scaled = [value / largest for value in f]
                terms.append(sum(value.exp() for value in scaled) / sum(scaled))
    return sum(terms) / len(terms)


WITH_PROTOTYPES = dict(prototypes=PROTOTYPES, known=KNOWN)
PAIRS = {
    'matching': (partial(prototype_matching, **WITH_PROTOTYPES), matching_loop),
    'attraction': (partial(prototype_attraction, **WITH_PROTOTYPES), attraction_loop),
    'repulsion': (repulsion, repulsion_loop),
    'sparsity': (sparsity, sparsity_loop),
}
each_loss = pytest.mark.parametrize('name', PAIRS)


@each_loss
@pytest.mark.parametrize('seed', [0, 1])
def test_value_and_gradient_are_the_loops(name: str, seed: int) -> None:
    features, labels = example(seed)
    features.requires_grad_()
    results = [loss(features, labels) for loss in PAIRS[name]]
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(result, features)[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)
    assert gradients[0].abs().max() > 0


@each_loss
def test_batch_and_channels_are_not_mixed_up(name: str) -> None:
    """A flattening without permute, as in the released code, gives other pixels to a class."""
    features, labels = example()
    # One label for each of the features' pixels, so that they can be turned over together.
    labels = labels[:, ::2, ::2]
    loss = PAIRS[name][0]
    expected = loss(features, labels)
    torch.testing.assert_close(loss(features.flip(0), labels.flip(0)), expected)
    torch.testing.assert_close(loss(features.flip(2, 3), labels.flip(1, 2)), expected)
    flattened = features.permute(0, 2, 3, 1).reshape(1, 1, -1, CHANNELS).permute(0, 3, 1, 2)
    torch.testing.assert_close(loss(flattened, labels.reshape(1, 1, -1)), expected)
    mixed = features.reshape(1, 1, -1, CHANNELS).permute(0, 3, 1, 2)
    assert not torch.isclose(loss(mixed, labels.reshape(1, 1, -1)), expected, rtol=1e-3)


@each_loss
def test_nothing_labelled_costs_nothing(name: str) -> None:
    features, labels = example()
    loss = PAIRS[name][0](features, torch.full_like(labels, 255))
    assert loss.item() == 0
    assert loss.dtype == features.dtype


@each_loss
def test_half_precision_is_computed_in_float32(name: str) -> None:
    features, labels = example()
    loss = PAIRS[name][0](features.half(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), PAIRS[name][0](features, labels), rtol=0.02, atol=0)


@each_loss
def test_sizes_that_do_not_fit(name: str) -> None:
    features, labels = example()
    with pytest.raises(ValueError, match=r'got \(2, 3, 4, 5\) and \(1, 8, 10\)'):
        PAIRS[name][0](features, labels[:1])


def grid(*classes: int) -> Tensor:
    """Labels (1, 1, N) of N pixels."""
    return torch.tensor(classes)[None, None]


def pixels(*values: list[float]) -> Tensor:
    """Features (1, C, 1, N)."""
    return torch.tensor(values).T[None, :, None].clone()


def test_known_values() -> None:
    prototypes, known = torch.tensor([[0.0, 0], [1, 2], [5, 5]]), torch.tensor([False, True, True])
    features, labels = pixels([1.0, 4], [3, 4], [9, 9]), grid(1, 1, 0)
    # The mean of class 1 is (2, 4).
    assert prototype_matching(features, labels, prototypes, known).item() == (1 + 4) / 2
    attraction = prototype_attraction(features, labels, prototypes, known)
    assert attraction.item() == (0 + 4 + 4 + 4) / 4
    # (2, 4) and background's (9, 9).
    assert repulsion(features, labels).item() == pytest.approx(1 / math.sqrt(49 + 25))
    expected = [(math.exp(0.25) + math.e) / 1.25, (math.exp(0.75) + math.e) / 1.75, 2 * math.e / 2]
    assert sparsity(features, labels).item() == pytest.approx(sum(expected) / 3)


def test_features_at_their_prototype_cost_nothing() -> None:
    labels = grid(1, 2, 4, 1)
    features = pixels(*PROTOTYPES[labels[0, 0]].tolist())
    for loss in (prototype_matching, prototype_attraction):
        assert loss(features, labels, PROTOTYPES.float(), KNOWN).item() == 0


def test_matching_moves_the_mean_and_attraction_each_feature() -> None:
    labels, prototypes = grid(1, 1), torch.tensor([[0.0], [3.0]])
    args = (labels, prototypes, torch.tensor([False, True]))
    assert prototype_matching(pixels([2.0], [4.0]), *args).item() == 0
    assert prototype_attraction(pixels([2.0], [4.0]), *args).item() == 1


def test_the_prototypes_are_not_taught() -> None:
    features, labels = example()
    prototypes = PROTOTYPES.clone().requires_grad_()
    for loss in (prototype_matching, prototype_attraction):
        loss(features.requires_grad_(), labels, prototypes, KNOWN).backward()
    assert prototypes.grad is None


def test_repulsion_falls_with_the_distance_and_pushes_apart() -> None:
    labels = grid(0, 1)
    near, far = (repulsion(pixels([0.0, 0], [x, 0]), labels) for x in (1.0, 2.0))
    assert near > far > 0
    features = pixels([0.0, 0], [1.0, 0]).requires_grad_()
    repulsion(features, labels).backward()
    # A step against the gradient takes the second to the right and the first to the left.
    assert features.grad[0, 0, 0, 1] < 0 < features.grad[0, 0, 0, 0]


def test_repulsion_of_equal_means_or_one_class_is_nothing() -> None:
    features = pixels([1.0, 2], [1.0, 2])
    for labels in (grid(0, 1), grid(1, 1)):
        assert repulsion(features, labels).item() == 0
    three = pixels([1.0, 2], [1.0, 2], [1.0, 5]).requires_grad_()
    loss = repulsion(three, grid(0, 1, 2))
    assert loss.item() == pytest.approx(1 / 3)
    loss.backward()
    assert three.grad.isfinite().all()


def test_sparsity_as_published_is_least_for_even_features() -> None:
    """Against what its name promises; docs/sdr.md says so."""
    peaked, even = (sparsity(pixels(values), grid(1)).item() for values in ([1.0, 0, 0], [1.0, 1, 1]))
    assert (peaked, even) == (pytest.approx(math.e + 2), pytest.approx(math.e))


def test_sparsity_skips_dead_pixels_and_negative_features() -> None:
    one = sparsity(pixels([2.0, 1, -3], [-1.0, -2, 0]), grid(1, 1))
    assert one.item() == pytest.approx(sparsity(pixels([2.0, 1, 0]), grid(1)).item())
    assert sparsity(pixels([-1.0, 0, 0]), grid(1)).item() == 0


def outputs(old_logits: Tensor) -> tuple[SegmentorOutput, SegmentorOutput]:
    features, _ = example()
    prototypes = ClassPrototypes(CLASSES)
    prototypes.load_state_dict(dict(sums=PROTOTYPES * KNOWN[:, None], counts=KNOWN.double()))
    logits = torch.zeros(BATCH, CLASSES, 4, 5)
    return SegmentorOutput(logits, (features,), prototypes=prototypes), SegmentorOutput(old_logits, (features,))


def test_matching_is_of_the_background_that_the_old_model_calls_old() -> None:
    features, labels = example()
    old = torch.randint(0, 3, (BATCH, 8, 10), generator=torch.Generator().manual_seed(3))
    logits = torch.nn.functional.one_hot(old, 3).permute(0, 3, 1, 2).double()
    student, teacher = outputs(logits)
    loss = PrototypeMatchingLoss(loss_weight=2.0)(student, teacher, labels)
    taught = torch.where(labels == 0, old, 0)
    torch.testing.assert_close(loss, 2 * matching_loop(features, taught), rtol=1e-6, atol=0)


@pytest.mark.parametrize(('part', 'name'), [
    (PrototypeAttractionLoss, 'attraction'), (RepulsionLoss, 'repulsion'), (SparsityLoss, 'sparsity')])
def test_the_others_are_of_the_labels_and_need_no_teacher(part: type, name: str) -> None:
    features, labels = example()
    student, _ = outputs(torch.zeros(BATCH, 3, 8, 10))
    loss = part(loss_weight=2.0)(student, None, labels)
    torch.testing.assert_close(loss, 2 * PAIRS[name][1](features, labels), rtol=1e-6, atol=0)
    assert not part.needs_teacher


@pytest.mark.parametrize(('part', 'name'), [(RepulsionLoss, 'repulsion'), (SparsityLoss, 'sparsity')])
def test_the_block_is_chosen(part: type, name: str) -> None:
    features, labels = example()
    student = SegmentorOutput(torch.zeros(BATCH, 3, 8, 10), (features, torch.zeros(BATCH, 2, 2, 2)))
    loss = part(block=0)(student, None, labels)
    torch.testing.assert_close(loss, PAIRS[name][1](features, labels), rtol=1e-6, atol=0)


def test_a_loss_without_its_prototypes_is_named() -> None:
    distillation = dict(near=dict(type='PrototypeAttractionLoss'))
    with pytest.raises(ValueError, match=r'distillation near: asks for prototypes'):
        build(model_cfg(CLASSES, distillation=distillation))


def test_stage_0_has_the_losses_that_need_no_teacher() -> None:
    distillation = dict(
        matching=dict(type='PrototypeMatchingLoss'), sparsity=dict(type='SparsityLoss'))  # fmt: skip
    model = build(model_cfg(CLASSES, distillation=distillation, prototypes=dict(type='ClassPrototypes')))
    losses = model.loss(images(), samples(torch.full((2, 64, 64), 3)))
    assert {name for name in losses if name.startswith('loss_')} == {'loss_sparsity'}
    assert model.prototypes.known.tolist() == [False, False, False, True, False]
    mean = model.backbone(images())[-1].mean((0, 2, 3))
    torch.testing.assert_close(model.prototypes.means[3], mean)
    assert not any('prototypes' in name for name in model.state_dict())
