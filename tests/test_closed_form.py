# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The closed-form classifier (C-RLS): ridge regression against loops, the hook that fits it, and whole runs."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, RUNNERS
from torch import Tensor, nn

from mmseg_sats.engine.export.stock import export_stage
from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.engine.hooks.methods import closed_form_hook as module
from mmseg_sats.functional.features.ridge import ridge_rows, ridge_sums
from mmseg_sats.models.heads.closed_form import ClosedFormClassifier
from mmseg_sats.models.pseudo_labels.sigmoid import SigmoidPseudoLabeler
from mmseg_sats.protocol import Protocol
from mmseg_sats.utils.checkpoint import read_json
from tests.runs import train_interrupted, weights
from tests.small_models import build, images, model_cfg, samples, save_weights
from tests.stage_folder import make_stage

WIDTH = 12
OPTIONS = dict(width=WIDTH, seed=3)


# The regression


def pixels(number: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (number,), generator=generator)
    labels[::9] = 255
    return torch.randn(number, 5, generator=generator, dtype=torch.float64), labels


def test_sums_by_hand() -> None:
    features, labels = pixels()
    gram, cross = ridge_sums(features, labels, 4)
    for i in range(5):
        for j in range(5):
            by_hand = sum(float(f[i] * f[j]) for f, label in zip(features, labels, strict=True) if label != 255)
            assert gram[i, j].item() == pytest.approx(by_hand)
        for k in range(4):
            by_hand = sum(float(f[i]) for f, label in zip(features, labels, strict=True) if label == k)
            assert cross[k, i].item() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match=r'features \(N, D\) and labels \(N,\), got \(60, 5\) and \(59,\)'):
        ridge_sums(features, labels[1:], 4)


@pytest.mark.parametrize('gamma', [0.1, 1.0, 30.0])
def test_rows_are_those_of_least_squares(gamma: float) -> None:
    features, labels = pixels()
    features, labels = features[labels < 255], labels[labels < 255]
    rows = ridge_rows(*ridge_sums(features, labels, 4), gamma)
    # gamma |W|^2 is the error of further samples sqrt(gamma) I with target 0.
    samples_ = torch.cat([features, math.sqrt(gamma) * torch.eye(5).double()])
    targets = torch.cat([nn.functional.one_hot(labels, 4).double(), torch.zeros(5, 4).double()])
    torch.testing.assert_close(rows.T, torch.linalg.lstsq(samples_, targets).solution)


def test_rows_are_those_of_the_recursion() -> None:
    """Woodbury's identity pixel by pixel, as ACIL has it: Psi is the inverse, Phi the rows."""
    features, labels = pixels()
    psi, phi = torch.eye(5).double() / 2.0, torch.zeros(5, 4).double()
    for pixel, label in zip(features, labels, strict=True):
        if label == 255:
            continue
        e, y = pixel[None], nn.functional.one_hot(label, 4).double()[None]
        psi = psi - psi @ e.T @ e @ psi / (1 + e @ psi @ e.T)
        phi = phi + psi @ e.T @ (y - e @ phi)
    torch.testing.assert_close(ridge_rows(*ridge_sums(features, labels, 4), 2.0), phi.T)


# The classifier


def test_the_classifier_is_the_ordinary_one_until_it_is_fitted() -> None:
    torch.manual_seed(0)
    classifier, x = ClosedFormClassifier(6, 3, **OPTIONS), torch.randn(2, 6, 4, 5)
    ordinary = nn.functional.conv2d(x, classifier.weight, classifier.bias)
    assert torch.equal(classifier.eval()(x), ordinary)
    rows = torch.randn(3, WIDTH)
    classifier.set_rows(rows)
    pixel = x[1, :, 2, 3]
    by_hand = rows @ (classifier.expansion @ pixel).clamp(min=0)
    torch.testing.assert_close(classifier(x)[1, :, 2, 3], by_hand)
    assert torch.equal(classifier.train()(x), ordinary)
    with torch.autocast('cpu', torch.bfloat16):
        assert classifier.eval()(x.bfloat16()).dtype == torch.float32
    other = ClosedFormClassifier(6, 3, **OPTIONS).eval()
    assert torch.equal(other.expansion, classifier.expansion)
    assert not torch.equal(other.expansion, ClosedFormClassifier(6, 3, WIDTH, seed=4).expansion)
    other.load_state_dict(classifier.state_dict())
    assert torch.equal(other(x), classifier(x))


def crls_cfg(num_classes: int, **options: Any) -> dict[str, Any]:
    return model_cfg(num_classes, closed_form=dict(OPTIONS), **options)


def test_what_a_model_refuses() -> None:
    with pytest.raises(ValueError, match=r'closed_form\.width=0: expected a whole number from 1'):
        build(model_cfg(3, closed_form=dict(width=0)))
    with pytest.raises(ValueError, match=r'unknown=True and closed_form=.* do not go together'):
        build(crls_cfg(3, unknown=True))
    tokens = dict(type='SegmenterMaskTransformerHead', in_channels=32, in_index=3, channels=8, num_layers=1,
                  num_heads=2, embed_dims=8, num_classes=3)  # fmt: skip
    with pytest.raises(TypeError, match=r'closed_form=.*: decode_head .* in which the classifier conv_seg'):
        build(crls_cfg(3) | dict(decode_head=tokens))


# The hook


def runner_of(model: nn.Module, folder: Path, start_from: Path | None = None, **cfg: Any) -> SimpleNamespace:
    folder.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        model=model, work_dir=str(folder), start_from=start_from, logger=MMLogger.get_current_instance(),
        message_hub=SimpleNamespace(update_scalar=lambda *_: None), cfg=Config(cfg),
    )  # fmt: skip


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls the hook on a model, label maps and the seeds of their images, in float64."""

    def call(runner: SimpleNamespace, stage: Any, labels: Tensor, seeds: list[int], **options: Any) -> None:
        runner.model.double()
        batches = [
            dict(inputs=images(1, seed=seed).double(), data_samples=samples(label[None]))
            for seed, label in zip(seeds, labels, strict=True)
        ]
        monkeypatch.setattr(module, 'images_seen_once', lambda *_: iter(batches))
        HOOKS.build(dict(dict(type='ClosedFormHook', stride=4), **options)).before_snapshot(runner, stage)

    return call


def label_maps(classes: tuple[int, ...], number: int, seed: int) -> Tensor:
    """(number, 64, 64) of the classes in blocks."""
    drawn = torch.randint(0, len(classes), (number, 8, 8), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(classes)[drawn].repeat_interleave(8, 1).repeat_interleave(8, 2)


def next_model(
    runner: SimpleNamespace, num_classes: int, num_old: int, **options: Any
) -> tuple[nn.Module, Path]:
    """The next stage's model, loaded from what a stage has left."""
    path = Path(save_weights(runner.model.float(), Path(runner.work_dir) / 'snapshot.pth'))
    model = build(crls_cfg(num_classes, old_model=dict(checkpoint=str(path), num_old=num_old), **options), seed=7)
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    return model, path


@torch.no_grad()
def test_the_hook_by_hand_and_later_stages_by_sums(fit: Callable, tmp_path: Path) -> None:
    protocol = Protocol('2-1', num_classes=3)
    first = label_maps((0, 1, 2, 255), 3, 0)
    runner = runner_of(build(crls_cfg(3)), tmp_path / 'stage_0')
    fit(runner, protocol.stages[0], first, [10, 11, 12], stride=12)
    # By hand: the classifier's input, at every third row and column of the features, with the nearest label.
    inputs: list[Tensor] = []
    watch = runner.model.decode_head.conv_seg.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    for row in range(3):
        runner.model(images(1, seed=10 + row).double(), mode='tensor')
    watch.remove()
    assert inputs[0].shape[2:] == (16, 16)
    expansion = runner.model.decode_head.conv_seg.expansion
    gram, cross = torch.eye(WIDTH).double(), torch.zeros(3, WIDTH).double()
    for row, given in enumerate(inputs):
        for y in range(0, 16, 3):
            for x in range(0, 16, 3):
                label = int(first[row, 4 * y, 4 * x])
                if label != 255:
                    e = (expansion @ given[0, :, y, x]).clamp(min=0)
                    gram += e[:, None] * e[None]
                    cross[label] += e
    rows = runner.model.decode_head.conv_seg.closed_form
    torch.testing.assert_close(rows, cross @ gram.inverse())
    # The next stage adds its own sums, and a row.
    model, path = next_model(runner, 4, 3)
    assert not model.decode_head.conv_seg.closed_form[3:].any()
    later = runner_of(model, tmp_path / 'stage_1', path)
    fit(later, protocol.stages[1], label_maps((0, 3), 2, 1), [20, 21], stride=12)
    with np.load(tmp_path / 'stage_0/closed_form.npz') as one, np.load(tmp_path / 'stage_1/closed_form.npz') as both:
        np.testing.assert_allclose(one['gram'] + np.eye(WIDTH), gram.numpy())
        assert both['cross'].shape == (4, WIDTH)
        np.testing.assert_array_equal(both['cross'][1:3], one['cross'][1:3])  # the new images show neither
        assert (np.diag(both['gram']) > np.diag(one['gram'])).all()


def rows_by_class(fit: Callable, folder: Path, stages: list[list[int]]) -> Tensor:
    """The last rows by class id, after stages of these classes whose images show old classes with their labels."""
    known = [0, 1, 2]
    runner = runner_of(build(crls_cfg(3)), folder / 'stage_0')
    fit(runner, Protocol('2-1', num_classes=2).stages[0], label_maps((0, 1, 2), 3, 0), [0, 1, 2])
    for index, new in enumerate(stages, 1):
        num_old, known = len(known), known + new
        model, path = next_model(runner, len(known), num_old)
        runner = runner_of(model, folder / f'stage_{index}', path)
        stage = Protocol(f'{num_old - 1}-{len(new)}', num_classes=len(known) - 1).stages[1]
        maps = torch.cat([label_maps((0, 1, class_id), 2, class_id) for class_id in new])
        channels = torch.tensor([known.index(one) if one in known else 255 for one in range(6)])
        fit(runner, stage, channels[maps], [100 * class_id + row for class_id in new for row in range(2)])
    rows = runner.model.decode_head.conv_seg.closed_form
    return rows[torch.tensor([known.index(class_id) for class_id in range(6)])]


def test_stages_and_the_order_of_classes_do_not_matter(fit: Callable, tmp_path: Path) -> None:
    """The defining property: 15-1 is 15-5, where the labels do not differ."""
    at_once = rows_by_class(fit, tmp_path / 'a', [[3, 4, 5]])
    assert at_once.abs().max() > 1e-3
    for number, stages in enumerate(([[3], [4], [5]], [[5], [3], [4]], [[4, 3], [5]])):
        # The file's rows are float64; those of the snapshots in between do not matter.
        one_by_one = rows_by_class(fit, tmp_path / str(number), stages)
        torch.testing.assert_close(one_by_one, at_once, rtol=1e-7, atol=1e-9)


def test_two_processes_are_one(fit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, maps = Protocol('2-1', num_classes=3).stages[0], label_maps((0, 1, 2), 4, 0)
    alone = runner_of(build(crls_cfg(3)), tmp_path / 'alone')
    fit(alone, stage, maps, [0, 1, 2, 3])
    given: list[list[Tensor]] = [[], []]
    for rank in (0, 1):  # first what each gives, then what each gets
        monkeypatch.setattr(module, 'all_reduce', lambda total, own=given[rank]: own.append(total.clone()))
        fit(runner_of(build(crls_cfg(3)), tmp_path / 'half'), stage, maps[rank::2], [rank, rank + 2])
    sums = iter([one + other for one, other in zip(*given, strict=True)])
    monkeypatch.setattr(module, 'all_reduce', lambda total: total.copy_(next(sums)))
    shared = runner_of(build(crls_cfg(3)), tmp_path / 'shared')
    fit(shared, stage, maps[::2], [0, 2])
    rows = [runner.model.decode_head.conv_seg.closed_form for runner in (alone, shared)]
    torch.testing.assert_close(*rows)


def test_the_labeler_completes_labels_by_the_scores_so_far(fit: Callable, tmp_path: Path) -> None:
    protocol = Protocol('2-1', num_classes=3)
    runner = runner_of(build(crls_cfg(3)), tmp_path / 'stage_0')
    fit(runner, protocol.stages[0], label_maps((0, 1, 2), 3, 0), [0, 1, 2])
    old = runner.model
    model, path = next_model(runner, 4, 3)
    assert torch.equal(model.old_model(images(1)).logits, old.float().eval()(images(1), mode='tensor'))
    labels = label_maps((0, 3), 1, 1)
    old.double().eval()
    logits = nn.functional.interpolate(old(images(1, seed=5).double(), mode='tensor'), (64, 64), mode='bilinear')
    best, channel = logits.max(1)
    threshold = float(best.sigmoid().median())
    completed = torch.where((labels == 0) & (channel > 0) & (best.sigmoid() >= threshold), channel, labels)
    assert set(completed.unique().tolist()) > {0, 3}
    sums = []
    for number, (maps, labeler) in enumerate(((labels, SigmoidPseudoLabeler(threshold)), (completed, None))):
        later, folder = runner_of(model, tmp_path / f'{number}', path), tmp_path / f'{number}'
        model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
        model.pseudo_labeler = labeler
        fit(later, protocol.stages[1], maps, [5])
        with np.load(folder / 'closed_form.npz') as arrays:
            sums.append((arrays['gram'], arrays['cross']))
    for one, other in zip(*sums, strict=True):
        np.testing.assert_allclose(one, other)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(gamma=0), 'gamma=0, expected a number above 0'),
        (dict(stride=0), 'stride=0, expected a whole number from 1'),
    ],
)
def test_impossible_numbers_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'ClosedFormHook: {message}'):
        HOOKS.build(dict(type='ClosedFormHook', **options))


def test_what_the_hook_refuses_before_anything_is_trained(tmp_path: Path) -> None:
    hook = HOOKS.build(dict(type='ClosedFormHook'))
    with pytest.raises(ValueError, match=r'expected model\.closed_form=dict\(width=\.\.\.\)'):
        hook.before_run(runner_of(build(model_cfg(3)), tmp_path))
    model = build(crls_cfg(3))
    hook.before_run(runner_of(model, tmp_path, memory=0, outside_dataset=None))
    with pytest.raises(ValueError, match=r'memory=6, expected none'):
        hook.before_run(runner_of(model, tmp_path, memory=6))
    model.pseudo_labeler = SimpleNamespace(needs_student=True)
    with pytest.raises(ValueError, match='needs a student'):
        hook.before_run(runner_of(model, tmp_path))


def test_sums_that_do_not_fit_are_named(fit: Callable, tmp_path: Path) -> None:
    stage = Protocol('2-1', num_classes=3).stages[1]
    runner = runner_of(build(crls_cfg(4)), tmp_path / 'stage_1', tmp_path / 'snapshot.pth')
    path, fit_it = tmp_path / 'closed_form.npz', lambda: fit(runner, stage, label_maps((0, 3), 1, 0), [0])
    with pytest.raises(FileNotFoundError, match=r"closed_form\.npz does not exist: the earlier stages' sums"):
        fit_it()
    path.write_bytes(b'no zip')
    with pytest.raises(ValueError, match=r'closed_form\.npz does not hold the sums'):
        fit_it()
    np.savez(path, gram=np.zeros((5, 5)), cross=np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r'3 channels and width 5, expected at most 3 channels and width 12'):
        fit_it()


def test_a_stage_with_an_expansion_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'stage_1 cannot be exported: its classifier is computed on an expansion'):
        export_stage(make_stage(tmp_path, 'crls', expansion_width=16), tmp_path / 'out')


# Whole runs


def test_runs_with_other_stages_and_one_that_is_killed(
    shapes_cfg: Callable[..., Config], tmp_path: Path
) -> None:
    options = dict(
        setting='sequential', pseudo_labeler=None, num_shapes=5, image_size=48, crop_size=48, val_images=4,
        train_images=16, expansion_width=64,
    )  # fmt: skip
    cfg = shapes_cfg('crls', 'one_by_one', **options)
    # Where stage 1 has written its sums, not its snapshot.
    train_interrupted(cfg, ClosedFormClassifier, 'set_rows', lambda _, rows: len(rows) == 5)
    folder = tmp_path / 'one_by_one'
    assert read_json(folder / 'stage_1/metrics.json')['train_seconds'] > 0
    assert not [*(folder / 'stage_1').glob('epoch_*'), *(folder / 'stage_1').glob('iter_*')]
    # The same stage 0 by any other method: here FT's, whose training is the same to the bit.
    ordinary = shapes_cfg('finetune', 'ft', **options | dict(protocol='3-2'))
    RUNNERS.build(ordinary).train()
    base = tmp_path / 'ft/stage_0/snapshot.pth'
    start = weights(folder / 'stage_0/snapshot.pth')
    assert all(torch.equal(start[key], value) for key, value in weights(base).items())
    options |= dict(protocol='3-2', class_order=[1, 2, 3, 5, 4], base=str(base))
    RUNNERS.build(shapes_cfg('crls', 'at_once', **options)).train()
    one, other = weights(folder / 'stage_2/snapshot.pth'), weights(tmp_path / 'at_once/stage_1/snapshot.pth')
    rows = 'decode_head.conv_seg.closed_form'
    torch.testing.assert_close(one[rows], other[rows][[0, 1, 2, 3, 5, 4]])
    for key, value in one.items():  # nothing else was trained; the ordinary classifier has rows that no one uses
        assert key == rows or '.conv_seg.' in key or torch.equal(value, start[key]), key


def test_a_base_is_taken_from_other_methods_and_by_them(tmp_path: Path) -> None:
    names = ['background', 'a', 'b']
    ordinary, fitted = build(model_cfg(3), seed=1), build(crls_cfg(3), seed=2)
    fitted.decode_head.conv_seg.set_rows(torch.randn(3, WIDTH))
    files = [Path(save_weights(model, tmp_path / f'{number}.pth')) for number, model in enumerate((ordinary, fitted))]
    into = build(crls_cfg(3), seed=3)
    into.load_state_dict(adopt_base(into, files[0], names))
    assert not into.decode_head.conv_seg.fitted
    assert torch.equal(into.decode_head.conv_seg.weight, ordinary.decode_head.conv_seg.weight)
    ordinary.load_state_dict(adopt_base(ordinary, files[1], names))
    assert torch.equal(ordinary.decode_head.conv_seg.weight, fitted.decode_head.conv_seg.weight)
