# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""PLOP's pseudo-labels against loops written from their definition."""

import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.functional import unbiased_cross_entropy
from mmseg_sats.functional.pseudo_labels.thresholds import find_rule
from mmseg_sats.models.pseudo_labels.entropy import EntropyPseudoLabeler
from mmseg_sats.models.pseudo_labels.selective import SelectivePseudoLabeler
from mmseg_sats.models.pseudo_labels.sigmoid import SigmoidPseudoLabeler

Batches = list[tuple[Tensor, Tensor]]


def batches_of(channels: int, count: int = 3, seed: int = 0) -> Batches:
    """Labels, half of them background, and logits of changing confidence."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        labels = torch.randint(-4, 4, (2, 24, 30), generator=generator).clamp(min=0)
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
        sharpness = 6 * torch.rand(2, 1, 24, 30, generator=generator, dtype=torch.float64)
        logits = torch.randn(2, channels, 24, 30, generator=generator, dtype=torch.float64)
        batches.append((labels, sharpness * logits))
    return batches


def entropy_of(logits: list[float]) -> float:
    weights = [math.exp(value) for value in logits]
    q = [weight / sum(weights) for weight in weights]
    return -sum(p * math.log(p) for p in q) / math.log(len(q)) if len(q) > 1 else 0.0


def pixels_of(labels: Tensor, logits: Tensor) -> Iterator[tuple[list[float], int]]:
    pixels = logits.movedim(1, -1).flatten(0, 2).tolist()
    return zip(pixels, labels.flatten().tolist(), strict=True)


def background_entropies(batches: Batches, channels: int) -> list[list[float]]:
    """Entropies of the background pixels, by predicted class."""
    by_class: list[list[float]] = [[] for _ in range(channels)]
    for labels, logits in batches:
        for pixel, label in pixels_of(labels, logits):
            if label == 0:
                by_class[int(np.argmax(pixel))].append(entropy_of(pixel))
    return by_class


def fitted(batches: Batches, channels: int, **options: Any) -> EntropyPseudoLabeler:
    labeler = EntropyPseudoLabeler(**options)
    labeler.reset(channels)
    for labels, logits in batches:
        labeler.update(labels, logits)
    labeler.compute()
    return labeler


@pytest.mark.parametrize('channels', [2, 5])
def test_labels_are_those_of_the_definition(channels: int) -> None:
    (labels, logits), = batches_of(channels, count=1)
    labeler = EntropyPseudoLabeler(ignore_index=254)
    labeler.thresholds = torch.linspace(0.2, 0.8, channels)
    before = labels.clone()
    completed = labeler(labels, logits)
    thresholds = labeler.thresholds.tolist()
    expected = []
    for pixel, label in pixels_of(labels, logits):
        best = int(np.argmax(pixel))
        taught = best if entropy_of(pixel) < thresholds[best] else 254
        expected.append(taught if label == 0 else label)
    assert completed.flatten().tolist() == expected
    assert set(range(channels)) <= set(completed[labels == 0].tolist())
    assert torch.equal(labels, before)
    assert torch.equal(completed[labels != 0], labels[labels != 0])


def test_an_unsure_pixel_is_ignored_and_a_sure_one_is_taught() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]).T[None, :, None]
    labeler = EntropyPseudoLabeler(threshold=0.5)
    assert labeler(torch.tensor([[[0, 0, 0]]]), logits).tolist() == [[[255, 0, 2]]]
    assert labeler(torch.tensor([[[7, 255, 1]]]), logits).tolist() == [[[7, 255, 1]]]
    # As unsure as the threshold is not sure.
    even = torch.zeros(1, 2, 1, 1)
    assert EntropyPseudoLabeler(threshold=1.0)(torch.tensor([[[0]]]), even).item() == 255


@pytest.mark.parametrize('rule', ['median', 'released'])
def test_a_class_that_is_masked_out_adds_nothing_to_the_entropy(rule: str) -> None:
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    masked = torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1)
    entropy = find_rule(rule).entropy
    # Only the normalisation knows of the fifth channel.
    factor = {'median': math.log(4) / math.log(5), 'released': 4 * math.log(4) ** 2 / (5 * math.log(5) ** 2)}
    torch.testing.assert_close(entropy(masked), entropy(logits) * factor[rule], rtol=1e-6, atol=0)


def test_entropies_of_sure_predictions_are_right_to_rounding() -> None:
    """Differences of large numbers would not be."""
    logits = torch.tensor([0.0, -9.0, -12.0, -40.0])[None, :, None] + 1000
    q = logits.double().softmax(1)
    expected = -(q * q.log()).sum(1) / math.log(4)
    torch.testing.assert_close(find_rule('median').entropy(logits), expected.float(), rtol=2e-4, atol=0)


def test_an_unsure_pixel_that_stays_background_is_taught_not_to_be_new() -> None:
    """With an unbiased cross-entropy: the new class loses its probability, the old ones keep their proportions."""
    old = torch.tensor([0.3, 0.1, 0.2])[None, :, None, None]
    labels = EntropyPseudoLabeler(threshold=0.5, ignore_index=0)(torch.tensor([[[0]]]), old)
    assert labels.tolist() == [[[0]]]
    logits = torch.cat([old, torch.full((1, 1, 1, 1), 0.4)], 1).double().requires_grad_()
    unbiased_cross_entropy(logits, labels, num_old=3).backward()
    p = logits.detach().softmax(1).flatten()
    gradient = logits.grad.flatten()
    assert gradient[3].item() == pytest.approx(p[3].item())
    torch.testing.assert_close(gradient[:3], -p[3] * p[:3] / p[:3].sum())


def test_thresholds_are_the_medians_over_several_updates() -> None:
    batches = batches_of(5)
    thresholds = fitted(batches, 5).thresholds
    entropies = background_entropies(batches, 5)
    for threshold, values in zip(thresholds.tolist(), entropies, strict=True):
        assert len(values) > 100
        assert threshold == pytest.approx(np.median(values), abs=2e-5)


@pytest.mark.parametrize('count', [1, 2, 3, 4, 5])
def test_medians_of_few_pixels(count: int) -> None:
    logits = torch.randn(1, 2, 1, count, generator=torch.Generator().manual_seed(count)).double()
    logits[:, 1] = logits[:, 0] + logits[:, 1].abs()
    labels = torch.zeros(1, 1, count, dtype=torch.long)
    values = background_entropies([(labels, logits)], 2)[1]
    assert len(values) == count
    threshold = fitted([(labels, logits)], 2).thresholds[1].item()
    assert threshold == pytest.approx(np.median(values), abs=2e-5)


@pytest.mark.parametrize('sharpness', [0.3, 1.0, 1.1, 1.2, 1.4, 2.0, 3.0])
@pytest.mark.parametrize('count', [1, 3, 25])
def test_a_pixel_at_the_median_does_not_pass(sharpness: float, count: int) -> None:
    logits = torch.zeros(1, 4, 1, count)
    logits[:, 1] = sharpness
    labels = torch.zeros(1, 1, count, dtype=torch.long)
    assert (fitted([(labels, logits)], 4)(labels, logits) == 255).all()
    logits[..., 0] *= 2  # of several, one is surer than all others
    expected = [1 if count > 1 else 255] + [255] * (count - 1)
    assert fitted([(labels, logits)], 4)(labels, logits).flatten().tolist() == expected


@pytest.mark.parametrize(
    'labeler', [EntropyPseudoLabeler(threshold=0.5), SelectivePseudoLabeler(), SigmoidPseudoLabeler()]
)
def test_logits_at_the_heads_resolution_are_resized(labeler: Any) -> None:
    (labels, _), = batches_of(3, count=1)
    logits = 5 * torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=False)
    assert torch.equal(labeler(labels, logits), labeler(labels, resized))
    with pytest.raises(ValueError, match=r'must be \(B, K_o, h, w\) and labels \(B, H, W\)'):
        labeler(labels[:1], logits)


def test_half_of_each_class_passes() -> None:
    batches = batches_of(5, count=4)
    labeler = fitted(batches, 5)
    for c in range(5):
        passed = total = 0
        for labels, logits in batches:
            own = (labels == 0) & (logits.argmax(1) == c)
            total += int(own.sum())
            passed += int((labeler(labels, logits)[own] == c).sum())
        assert abs(passed - total / 2) <= 2


def test_only_background_pixels_are_counted() -> None:
    (labels, logits), = batches_of(4, count=1)
    labeler = fitted([(labels, logits)], 4)
    assert labeler.histograms.sum() == (labels == 0).sum()
    scrambled = torch.where((labels == 0)[:, None], logits, logits.flip(1) * 3)
    assert torch.equal(fitted([(labels, scrambled)], 4).histograms, labeler.histograms)


def test_histograms_of_ranks_add_up() -> None:
    batches = batches_of(4, count=4)
    whole, left, right = fitted(batches, 4), fitted(batches[:2], 4), fitted(batches[2:], 4)
    left.histograms.add_(right.histograms)
    assert torch.equal(left.compute(), whole.thresholds)


def test_the_floor_holds_for_sure_and_for_absent_classes() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = 50.0
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    labeler = fitted([(labels, logits)], 3, floor=0.01)
    assert labeler.thresholds.tolist() == pytest.approx([0.01, 0.01, 0.01])
    assert (labeler(labels, logits) == 1).all()


def test_wholly_unsure_pixels_stay_in_the_last_bin() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labeler = fitted([(labels, torch.zeros(1, 6, 4, 4))], 6)
    assert labeler.histograms[0, -1] == 16
    assert labeler.thresholds[0].item() == pytest.approx(1, abs=2e-5)


def test_one_channel_has_no_doubt() -> None:
    labels = torch.tensor([[[0, 1], [255, 0]]])
    logits = torch.randn(1, 1, 2, 2)
    labeler = fitted([(labels, logits)], 1)
    assert torch.equal(labeler(labels, logits), labels)
    assert torch.equal(fitted([(labels, logits)], 1, threshold='released')(labels, logits), labels)


def test_half_precision_logits_are_read_in_float32() -> None:
    (labels, logits), = batches_of(5, count=1)
    half = logits.bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        labeler = fitted([(labels, half)], 5)
        completed = labeler(labels, half)
    exact = fitted([(labels, half.float())], 5)
    assert torch.equal(labeler.histograms, exact.histograms)
    assert torch.equal(completed, exact(labels, half.float()))


# --- the released arithmetic ---


def released_entropy(q: np.ndarray) -> float:
    """Mean over classes, divided by the log of their number, and once more."""
    classes = len(q)
    mean = -sum(p * math.log(p + 1e-8) for p in q) / classes
    return mean / math.log(classes + 1e-8) / math.log(classes)


def released_threshold(histogram: list[int]) -> float:
    """The released search for a median: its running sum adds bin numbers."""
    half, running, bins = sum(histogram) / 2, 0.0, len(histogram)
    for index in range(bins):
        if running <= half <= running + histogram[index]:
            break
        running += index
    share = np.float64(half - running) / np.float64(histogram[index])
    return index / bins + share / bins


@pytest.mark.parametrize('channels', [2, 3, 5])
def test_released_arithmetic(channels: int) -> None:
    batches = batches_of(channels)
    labeler = fitted(batches, channels, threshold='released')
    histograms = np.zeros((channels, 100), dtype=int)
    for labels, logits in batches:
        for image_labels, q in zip(labels, logits.softmax(1).numpy(), strict=True):
            for row, column in (image_labels == 0).nonzero().tolist():
                value = released_entropy(q[:, row, column])
                histograms[q[:, row, column].argmax(), min(int(value * 100), 99)] += 1
    assert labeler.histograms.tolist() == histograms.tolist()
    with np.errstate(divide='ignore'):
        found = [released_threshold(histogram) for histogram in histograms.tolist()]
    expected = [min(max(threshold, 0.001), 1.0) for threshold in found]
    assert labeler.thresholds.tolist() == pytest.approx(expected)


def test_released_search_on_any_histogram() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (300, 100)) * (rng.random((300, 100)) < rng.random((300, 1)))
    counts[0] = 0  # a class without pixels
    counts[1] = [0] * 20 + [30000] * 3 + [0] * 77  # never stops: every pixel passes
    counts[2] = [0] * 99 + [1]
    labeler = EntropyPseudoLabeler(threshold='released', floor=0.002)
    labeler.reset(300)
    labeler.histograms.copy_(torch.from_numpy(counts))
    thresholds = labeler.compute().tolist()
    with np.errstate(divide='ignore', invalid='ignore'):
        found = [released_threshold(row) if sum(row) else 0.0 for row in counts.tolist()]
    # An infinite threshold lets all pass and NaN none: as 1 and the floor they fit into JSON.
    expected = [0.002 if math.isnan(value) else max(0.002, 1.0 if value == math.inf else value)
                for value in found]
    assert thresholds == pytest.approx(expected, rel=1e-6)
    assert thresholds[0] == pytest.approx(0.002)
    assert thresholds[1] == 1.0


def test_released_arithmetic_lets_all_of_ade20k_pass() -> None:
    (labels, logits), = batches_of(101, count=1)
    released = fitted([(labels, logits)], 101, threshold='released')
    median = fitted([(labels, logits)], 101)
    background = labels == 0
    assert (released(labels, logits)[background] != 255).all()
    assert 0.3 < (median(labels, logits)[background] != 255).double().mean() < 0.6


# --- state ---


def test_thresholds_must_be_found_first() -> None:
    labels, logits = torch.zeros(1, 2, 2).long(), torch.zeros(1, 3, 2, 2)
    labeler = EntropyPseudoLabeler()
    assert labeler.needs_pass
    with pytest.raises(RuntimeError, match='PseudoLabelThresholdHook'):
        labeler(labels, logits)
    with pytest.raises(RuntimeError, match='reset'):
        labeler.update(labels, logits)
    labeler.reset(3)
    labeler.update(labels, logits)
    with pytest.raises(RuntimeError, match='PseudoLabelThresholdHook'):
        labeler(labels, logits)
    labeler.compute()
    labeler(labels, logits)
    labeler.reset(4)
    assert labeler.thresholds is None


def test_a_number_needs_no_pass() -> None:
    labeler = EntropyPseudoLabeler(threshold=0.25)
    assert not labeler.needs_pass
    for channels in (3, 4):  # from stage to stage
        (labels, logits), = batches_of(channels, count=1)
        labeler.reset(channels)
        by_hand = EntropyPseudoLabeler()
        by_hand.thresholds = torch.full((channels,), 0.25)
        assert torch.equal(labeler(labels, logits), by_hand(labels, logits))


@pytest.mark.parametrize('threshold', ['median', 'released', 0.25])
def test_it_can_be_pickled_with_its_model(threshold: str | float) -> None:
    copied = pickle.loads(pickle.dumps(EntropyPseudoLabeler(threshold=threshold)))
    assert copied.threshold == threshold


@pytest.mark.parametrize('threshold', ['median', 'released', 0.25])
def test_state_survives_json(threshold: str | float) -> None:
    batches = batches_of(4)
    labeler = fitted(batches, 4, threshold=threshold)
    loaded = EntropyPseudoLabeler(threshold=threshold)
    loaded.load_state_dict(json.loads(json.dumps(labeler.state_dict(), allow_nan=False)))
    assert torch.equal(loaded.thresholds, labeler.thresholds)
    for labels, logits in batches:
        assert torch.equal(loaded(labels, logits), labeler(labels, logits))


def test_thresholds_of_another_rule_are_not_taken_over() -> None:
    state = fitted(batches_of(3), 3, threshold='released').state_dict()
    with pytest.raises(ValueError, match=r"threshold='released', expected threshold='median'"):
        EntropyPseudoLabeler().load_state_dict(state)
    with pytest.raises(ValueError, match=r'floor=0.001, expected floor=0.5'):
        EntropyPseudoLabeler(threshold='released', floor=0.5).load_state_dict(state)


def share_by_loop(labels: Tensor, completed: Tensor) -> list[float]:
    shares = []
    for label, after in zip(labels, completed, strict=True):
        background = sure = 0
        for before, then in zip(label.flatten().tolist(), after.flatten().tolist(), strict=True):
            background += before == 0
            sure += before == 0 and then != 255
        shares.append(sure / background if background else 1.0)
    return shares


def test_images_are_weighed_by_the_confident_share_of_their_background() -> None:
    (labels, logits), = batches_of(5, count=1)
    labels = torch.cat([labels, torch.full_like(labels[:1], 255), torch.full_like(labels[:1], 6)])
    logits = torch.cat([logits, logits[:2]])
    labeler = EntropyPseudoLabeler(threshold=0.6, scale_images=True)
    completed = labeler(labels, logits)
    weights = labeler.image_weights(labels, completed)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(share_by_loop(labels, completed))
    assert weights[-2:].tolist() == [1, 1]  # no background at all
    assert 0 < weights[0] < 1
    assert EntropyPseudoLabeler(threshold=0.6).image_weights(labels, completed) is None


@pytest.mark.parametrize(('threshold', 'share'), [(1e-9, 0.0), (1.0, 1.0)])
def test_the_share_at_its_ends(threshold: float, share: float) -> None:
    (labels, logits), = batches_of(3, count=1)
    labeler = EntropyPseudoLabeler(threshold=threshold, scale_images=True)
    assert set(labeler.image_weights(labels, labeler(labels, logits)).tolist()) == {share}


def test_nothing_of_it_is_in_a_state_dict() -> None:
    model = nn.Linear(1, 1)
    model.pseudo_labeler = MODELS.build({'type': 'EntropyPseudoLabeler'})
    model.pseudo_labeler.thresholds = torch.ones(3)
    assert set(model.state_dict()) == {'weight', 'bias'}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'medain' is unknown.*did you mean 'median'"):
        EntropyPseudoLabeler(threshold='medain')
    with pytest.raises(ValueError, match=r'threshold must be in .* got 1\.5'):
        EntropyPseudoLabeler(threshold=1.5)
    with pytest.raises(ValueError, match=r'floor must be in .* got -1'):
        EntropyPseudoLabeler(floor=-1)
    with pytest.raises(ValueError, match='scale_images=True with ignore_index=0'):
        EntropyPseudoLabeler(scale_images=True, ignore_index=0)
    labeler = EntropyPseudoLabeler()
    with pytest.raises(ValueError, match='at least 1, got 0'):
        labeler.reset(0)
    labeler.reset(3)
    with pytest.raises(ValueError, match=r'\(1, 3, 2, 2\) and \(2, 2, 3\)'):
        labeler.update(torch.zeros(2, 2, 3).long(), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match='4 channels, expected the 3'):
        labeler.update(torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r'thresholds must be numbers of shape \(K_o,\)'):
        labeler.thresholds = torch.tensor([0.5, math.nan])
