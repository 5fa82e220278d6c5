# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""UCB's weights of pixels: by hand, against a loop, in a segmentor's losses, and through a resumed run."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.functional import certainty_weights, class_balance_weights
from mmseg_sats.models import SegmentorOutput, UncertaintyBalanceWeights
from mmseg_sats.models.parts import DistillationPart
from mmseg_sats.models.pixel_losses.image_weights import product_of_weights
from tests.small_models import auxiliary_head_cfg, build, images, model_cfg, samples, save_weights
from tests.tensors import random_labels, random_tensor

OLD, SEEN = 4, 6


def test_certainty_falls_from_e_to_1_and_then_is_0() -> None:
    entropies = torch.tensor([0.0, 0.25, 0.499999, 0.5, 1.0], dtype=torch.float64)
    expected = [math.e, math.exp(0.5), 1.0, 0.0, 0.0]
    assert certainty_weights(entropies).tolist() == pytest.approx(expected, abs=1e-5)
    assert certainty_weights(entropies, 0.8)[3].item() == pytest.approx(math.exp(0.3 / 0.8))


def test_rare_classes_count_more_within_the_bounds() -> None:
    # Five old channels and one new: factors between 1 / sqrt(5) and sqrt(5). The mean of 3 classes with pixels is 40.
    counts = torch.tensor([900, 20, 0, 1, 0, 99])
    expected = [1, 2, 1, math.sqrt(5), 1, max(40 / 99, 1 / math.sqrt(5))]
    assert class_balance_weights(counts, 5).tolist() == pytest.approx(expected)
    # As many new classes as old ones: no room; more new than old: the same bounds the other way round.
    assert class_balance_weights(torch.tensor([0, 5, 1, 1]), 2).tolist() == [1, 1, 1, 1]
    more_new = class_balance_weights(torch.tensor([0, 1, 9]), 1)
    assert more_new.tolist() == pytest.approx([1, math.sqrt(2), 1 / math.sqrt(2)])
    assert class_balance_weights(torch.tensor([7, 0, 0]), 2).tolist() == [1, 1, 1]
    assert class_balance_weights(torch.tensor([7, 3]), 2).tolist() == [1, 1]


def by_loop(labels: Tensor, completed: Tensor, logits: Tensor, counts: list[int], limit: float) -> Tensor:
    present = [c for c in range(1, SEEN) if counts[c]]
    low, high = math.sqrt((SEEN - OLD) / OLD), math.sqrt(OLD / (SEEN - OLD))
    result = torch.zeros(labels.shape)
    for image, y, x in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        q = [math.exp(value) for value in logits[image, :, y, x].tolist()]
        q = [value / sum(q) for value in q]
        entropy = -sum(value * math.log(value) for value in q) / math.log(OLD)
        if labels[image, y, x] not in (0, 255):
            entropy = 0.0
        if entropy >= limit:
            continue
        weight = math.exp(-(entropy - limit) / limit)
        label = completed[image, y, x].item()
        if label not in (0, 255):
            weight *= min(max(sum(counts[1:]) / (len(present) * counts[label]), low), high)
        result[image, y, x] = weight
    return result / result.mean()


def test_weights_of_images_and_of_pixels_are_multiplied() -> None:
    """Also where there are as many images as columns, which a plain product would take for one another."""
    of_images, more = random_tensor(3), random_tensor(3, seed=1)
    of_pixels = random_tensor(3, 2, 3, seed=2)
    expected = torch.stack([of_pixels[i] * of_images[i] * more[i] for i in range(3)])
    assert torch.allclose(product_of_weights([of_images, None, of_pixels, more]), expected)
    assert torch.equal(product_of_weights([of_images, more]), of_images * more)
    assert product_of_weights([None]) is None


@pytest.mark.parametrize('limit', [0.5, 0.9])
def test_is_the_formula_and_counts_from_the_beginning_of_the_stage(limit: float) -> None:
    weigh, counts = UncertaintyBalanceWeights(SEEN, limit), [0] * SEEN
    for seed in range(3):
        labels = random_labels(2, 8, 8, classes=SEEN, seed=seed)
        logits = random_tensor(2, OLD, 8, 8, seed=seed, dtype=torch.float32) / 2
        completed = torch.where((labels == 0) & (logits[:, 1] > 0), 1, labels)
        for c in range(SEEN):
            counts[c] += int((completed == c).sum())
        weights = weigh(labels, completed, SegmentorOutput(logits, ()))
        assert weights.mean().item() == pytest.approx(1)
        assert 0 < (weights == 0).sum() < weights.numel()
        torch.testing.assert_close(weights, by_loop(labels, completed, logits, counts, limit))


def test_the_counts_go_on_from_a_checkpoint() -> None:
    labels, teacher = random_labels(2, 8, 8, classes=SEEN), SegmentorOutput(random_tensor(2, OLD, 2, 2).float(), ())
    weigh = UncertaintyBalanceWeights(SEEN)
    weigh(labels, labels, teacher)
    other = UncertaintyBalanceWeights(SEEN)
    other.load_state_dict(weigh.state_dict())
    more = random_labels(2, 8, 8, classes=SEEN, seed=1)
    assert torch.equal(weigh(more, more, teacher), other(more, more, teacher))
    assert not torch.equal(UncertaintyBalanceWeights(SEEN)(more, more, teacher), weigh(more, more, teacher))
    with pytest.raises(ValueError, match='counts of 6 classes do not fit 7 classes'):
        UncertaintyBalanceWeights(7).load_state_dict(weigh.state_dict())


@pytest.mark.parametrize('limit', [0, -1, 1.1])
def test_impossible_limits(limit: float) -> None:
    with pytest.raises(ValueError, match=r'UncertaintyBalanceWeights.limit must be in \(0, 1\]'):
        UncertaintyBalanceWeights(SEEN, limit)


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    path = save_weights(build(model_cfg(OLD), seed=8), tmp_path_factory.mktemp('old') / 'snapshot.pth')
    return build(model_cfg(
        SEEN,
        old_model=dict(checkpoint=path, num_old=OLD),
        auxiliary_head=[auxiliary_head_cfg(SEEN)],
        pseudo_labeler=dict(type='EntropyPseudoLabeler', threshold=0.8, scale_images=True),
        pixel_weights=dict(type='UncertaintyBalanceWeights', limit=0.9),
    ))  # fmt: skip


class Shares(DistillationPart):
    """Weighs the images, as STAR does."""

    def image_weights(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        return torch.tensor([0.5, 2.0])

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        return 0 * student.logits.sum()


@pytest.mark.parametrize('by_part', [False, True])
def test_a_segmentor_weighs_the_pixels_of_all_heads_and_the_labelers_images_too(
    by_part: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_part:
        monkeypatch.setitem(model.distillation._modules, 'shares', Shares())
    labels = random_labels(2, 64, 64, classes=SEEN)
    weigh = copy.deepcopy(model.pixel_weights)
    losses = model.train().loss(images(), samples(labels))
    teacher = model.old_model(images())
    logits = teacher.resized((64, 64))
    completed = model.pseudo_labeler(labels, logits)
    factors = weigh(labels, completed, teacher)
    factors = factors * model.pseudo_labeler.image_weights(labels, completed)[:, None, None]
    factors = factors * torch.tensor([0.5, 2.0] if by_part else [1.0, 1.0])[:, None, None]
    assert factors.std() > 0.1
    features = model.backbone(images())
    for name, head, weight in (('decode', model.decode_head, 1), ('aux_0', model.auxiliary_head[0], 0.4)):
        student = F.interpolate(head(features), (64, 64), mode='bilinear')
        pixels = F.cross_entropy(student, completed, ignore_index=255, reduction='none')
        torch.testing.assert_close(losses[f'{name}.loss_ce'], weight * (pixels * factors).mean(), atol=1e-5, rtol=1e-4)
    assert torch.equal(model.pixel_weights.counts, weigh.counts)
    assert not any('weigh' in key and 'count' in key for key in model.state_dict())


@HOOKS.register_module()
class SeeCounts(Hook):
    """Writes down the counts that each epoch begins with, and can interrupt stage 1."""

    priority = 'LOWEST'
    begun: list[tuple[str, int, list[int]]] = []
    stop = False

    def before_train_epoch(self, runner: Runner) -> None:
        self.begun.append((Path(runner.work_dir).name, runner.epoch, runner.model.pixel_weights.counts.tolist()))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if self.stop and runner.work_dir.endswith('stage_1') and runner.epoch == 1:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_with_its_counts(shapes_cfg: Callable[..., Config]) -> None:
    init_default_scope('mmseg')
    SeeCounts.begun.clear()
    cfg = shapes_cfg('plop', batch_size=4, epochs=2, protocol='3-3')
    cfg.model.pixel_weights = dict(type='UncertaintyBalanceWeights')
    cfg.train_dataloader.num_batch_per_epoch = cfg.test_dataloader.num_batch_per_epoch = 1
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='SeeCounts')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeeCounts, 'stop', True)
        with pytest.raises(KeyboardInterrupt):
            RUNNERS.build(cfg).train()
    *_, first, interrupted = SeeCounts.begun
    assert first == ('stage_1', 0, [0] * 7)
    assert sum(interrupted[2]) > 0
    SeeCounts.begun.clear()
    cfg.resume = True
    RUNNERS.build(cfg).train()
    assert SeeCounts.begun == [interrupted]
