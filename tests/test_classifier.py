# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Classifiers grow while a checkpoint is loaded: known values, and what growing must not change."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import load_checkpoint
from mmseg.models.decode_heads import FCNHead
from torch import Tensor, nn

from mmseg_sats.models.heads.classifier import add_background, grow_head, shape_mismatches
from mmseg_sats.models.segmentors import IncrementalEncoderDecoder
from tests.small_models import (
    auxiliary_head_cfg,
    build,
    images,
    model_cfg,
    save_weights,
)

NUM_OLD = 4
ROWS = {'conv_seg.weight': 0, 'conv_seg.bias': 0}


def make_head(num_classes: int, seed: int = 0) -> FCNHead:
    torch.manual_seed(seed)
    return FCNHead(in_channels=5, channels=5, num_convs=0, num_classes=num_classes)


def old_rows(num_old: int = NUM_OLD) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        'head.conv_seg.weight': torch.randn(num_old, 5, 1, 1, generator=generator),
        'head.conv_seg.bias': torch.randn(num_old, generator=generator),
    }


def logits_of(rows: dict[str, Tensor]) -> Tensor:
    """Logits (2, K, 6, 7) of a 1x1 classifier on random features."""
    features = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(4))
    return torch.conv2d(features, rows['head.conv_seg.weight'], rows['head.conv_seg.bias'])


def grown_rows(num_new: int, init: str) -> dict[str, Tensor]:
    rows = old_rows()
    grow_head(rows, 'head.', make_head(NUM_OLD + num_new), ROWS, NUM_OLD, init)
    return rows


def test_balanced_known_values() -> None:
    rows = {
        'head.conv_seg.weight': torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])[..., None, None],
        'head.conv_seg.bias': torch.tensor([0.5, -1.0]),
    }
    grow_head(rows, 'head.', make_head(4), ROWS, 2, 'balanced')
    background = [1.0, 2, 3, 4, 5]
    assert rows['head.conv_seg.weight'][..., 0, 0].tolist() == [
        background, [6, 7, 8, 9, 10], background, background
    ]
    shared = 0.5 - math.log(3)
    torch.testing.assert_close(rows['head.conv_seg.bias'], torch.tensor([shared, -1, shared, shared]))


@pytest.mark.parametrize('num_new', [1, 2, 30])
def test_balanced_model_says_background_or_new_where_the_old_one_said_background(num_new: int) -> None:
    old = logits_of(old_rows()).log_softmax(1)
    new = logits_of(grown_rows(num_new, 'balanced')).log_softmax(1)
    background_or_new = torch.cat([new[:, :1], new[:, NUM_OLD:]], dim=1).logsumexp(1)
    torch.testing.assert_close(background_or_new, old[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(new[:, 1:NUM_OLD], old[:, 1:], atol=1e-5, rtol=0)
    # All of them share it alike.
    torch.testing.assert_close(new[:, 0], old[:, 0] - math.log(num_new + 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize('num_new', [1, 2, 30])
def test_keep_background_adds_copies_of_the_background_and_moves_no_old_logit(num_new: int) -> None:
    rows, old = grown_rows(num_new, 'keep_background'), old_rows()
    for key, before in old.items():
        expected = [list(row.flatten()) for row in before] + [list(before[0].flatten())] * num_new
        assert [list(row.flatten()) for row in rows[key]] == expected
    new, before = logits_of(rows), logits_of(old)
    torch.testing.assert_close(new[:, :NUM_OLD], before)
    torch.testing.assert_close(new[:, NUM_OLD:], before[:, :1].expand(-1, num_new, -1, -1))
    # Old classes keep their odds against background, which the balanced ones raise by num_new + 1.
    balanced = logits_of(grown_rows(num_new, 'balanced'))
    torch.testing.assert_close(balanced[:, 0] + math.log(num_new + 1), new[:, 0])


def test_random_keeps_old_rows_and_the_heads_own_new_ones() -> None:
    rows, old, head = grown_rows(3, 'random'), old_rows(), make_head(NUM_OLD + 3)
    for key, fresh in (('weight', head.conv_seg.weight), ('bias', head.conv_seg.bias)):
        grown = rows[f'head.conv_seg.{key}']
        assert torch.equal(grown[:NUM_OLD], old[f'head.conv_seg.{key}'])
        assert torch.equal(grown[NUM_OLD:], fresh[NUM_OLD:])
        assert not torch.equal(fresh[:NUM_OLD], old[f'head.conv_seg.{key}'])


@pytest.mark.parametrize('init', ['balanced', 'keep_background', 'random'])
def test_growing_changes_neither_the_old_tensors_nor_the_head(init: str) -> None:
    rows, head = old_rows(), make_head(NUM_OLD + 2)
    kept = {key: value.clone() for key, value in rows.items()}
    before = dict(rows)
    fresh = head.conv_seg.weight.clone()
    grow_head(rows, 'head.', head, ROWS, NUM_OLD, init)
    assert all(torch.equal(before[key], kept[key]) for key in kept)
    rows['head.conv_seg.weight'].add_(1)
    assert torch.equal(head.conv_seg.weight, fresh)


@pytest.mark.parametrize('init', ['balanced', 'keep_background', 'random'])
def test_a_checkpoint_that_has_grown_is_left_alone(init: str) -> None:
    rows = grown_rows(2, init)
    before = dict(rows)
    grow_head(rows, 'head.', make_head(NUM_OLD + 2), ROWS, NUM_OLD, init)
    assert all(rows[key] is before[key] for key in before)


@pytest.mark.parametrize('init', ['balanced', 'keep_background', 'random', 'unknown'])
def test_without_a_new_class_nothing_grows(init: str) -> None:
    rows = old_rows()
    before = dict(rows)
    grow_head(rows, 'head.', make_head(NUM_OLD), ROWS, NUM_OLD, init)
    assert all(rows[key] is before[key] for key in before)


def test_unknown_init_names_the_option_and_its_choices() -> None:
    with pytest.raises(ValueError, match=r"classifier_init='balancd' is unknown.*'balanced'"):
        grow_head(old_rows(), 'head.', make_head(5), ROWS, NUM_OLD, 'balancd')


def test_add_background_keeps_the_old_classes_and_never_wins() -> None:
    rows, old = old_rows(), old_rows()
    add_background(rows, 'head.', ROWS)
    assert torch.equal(rows['head.conv_seg.weight'][1:], old['head.conv_seg.weight'])
    new, before = logits_of(rows), logits_of(old)
    assert new.shape[1] == NUM_OLD + 1
    torch.testing.assert_close(new[:, 1:].softmax(1), before.softmax(1))
    assert (new.argmax(1) == before.argmax(1) + 1).all()
    torch.testing.assert_close(new[:, 0], before.mean(1))


def load_by_mmengine(model: nn.Module, path: str) -> None:
    load_checkpoint(model, path, map_location='cpu')


def load_by_torch(model: nn.Module, path: str) -> None:
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])


LOADERS = [load_by_mmengine, load_by_torch]
AUXILIARY = {'single': lambda k: auxiliary_head_cfg(k),
             'list': lambda k: [auxiliary_head_cfg(k), auxiliary_head_cfg(k, 2)]}
PREFIXES = {'single': ['decode_head', 'auxiliary_head'],
            'list': ['decode_head', 'auxiliary_head.0', 'auxiliary_head.1']}


def build_later_stage(num_classes: int, path: str, **options: Any) -> IncrementalEncoderDecoder:
    return build(
        model_cfg(num_classes, old_model=dict(checkpoint=path, num_old=NUM_OLD), **options), seed=9
    )


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('init', ['balanced', 'keep_background', 'random'])
@pytest.mark.parametrize('auxiliary', ['single', 'list'])
def test_all_heads_grow_while_loading(
    tmp_path: Path, load: Callable, init: str, auxiliary: str
) -> None:
    make = AUXILIARY[auxiliary]
    old = build(model_cfg(NUM_OLD, auxiliary_head=make(NUM_OLD)))
    path = save_weights(old, tmp_path / 'snapshot.pth')
    model = build_later_stage(6, path, auxiliary_head=make(6), classifier_init=init)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    load(model, path)
    own, before = model.state_dict(), old.state_dict()
    for prefix in PREFIXES[auxiliary]:
        weight, bias = (f'{prefix}.conv_seg.{kind}' for kind in ('weight', 'bias'))
        expected = before[weight][:1].expand(2, -1, -1, -1) if init != 'random' else fresh[weight][4:]
        assert torch.equal(own[weight][:NUM_OLD], before[weight])
        assert torch.equal(own[weight][NUM_OLD:], expected)
        assert torch.equal(own[bias][1:NUM_OLD], before[bias][1:])
        assert torch.equal(own[bias][0], before[bias][0]) == (init != 'balanced')
    rest = [key for key in before if 'conv_seg' not in key]
    assert all(torch.equal(own[key], before[key]) for key in rest)


@pytest.mark.parametrize('load', LOADERS)
def test_a_whole_model_keeps_the_old_probabilities(tmp_path: Path, load: Callable) -> None:
    old = build(model_cfg(NUM_OLD)).eval()
    path = save_weights(old, tmp_path / 'snapshot.pth')
    model = build_later_stage(7, path).eval()
    load(model, path)
    with torch.no_grad():
        before = old(images(), mode='tensor').softmax(1)
        after = model(images(), mode='tensor').softmax(1)
    torch.testing.assert_close(after[:, 1:NUM_OLD], before[:, 1:], atol=1e-5, rtol=0)
    rest = after[:, 0] + after[:, NUM_OLD:].sum(1)
    torch.testing.assert_close(rest, before[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize('load', LOADERS)
def test_a_resumed_checkpoint_of_the_same_stage_is_loaded_bitwise(
    tmp_path: Path, load: Callable
) -> None:
    first = build_later_stage(6, 'never read')
    path = save_weights(first, tmp_path / 'epoch_1.pth')
    second = build(model_cfg(6, old_model=dict(checkpoint='never read', num_old=NUM_OLD)), seed=5)
    load(second, path)
    own = second.state_dict()
    assert all(torch.equal(own[key], value) for key, value in first.state_dict().items())


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('num_classes', [3, 5])
def test_another_number_of_classes_raises(tmp_path: Path, load: Callable, num_classes: int) -> None:
    path = save_weights(build(model_cfg(num_classes)), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=rf'decode_head\.conv_seg\.weight: \({num_classes}, 8, 1, 1\)'):
        load(build_later_stage(6, path), path)
    with pytest.raises(ValueError, match=r'decode_head\.conv_seg\.weight'):
        load(build(model_cfg(6)), path)


@pytest.mark.parametrize('load', LOADERS)
def test_a_mismatch_elsewhere_raises_and_names_the_key(tmp_path: Path, load: Callable) -> None:
    weights = build(model_cfg(NUM_OLD)).state_dict()
    key = 'backbone.layers.0.0.projection.weight'
    weights[key] = torch.zeros(9, 3, 7, 7)
    torch.save(dict(meta={}, state_dict=weights), tmp_path / 'other.pth')
    model = build_later_stage(6, 'never read')
    with pytest.raises(ValueError, match=rf'{key}: \(9, 3, 7, 7\) in the checkpoint, \(8, 3, 7, 7\)'):
        load(model, str(tmp_path / 'other.pth'))


def test_shape_mismatches_with_a_prefix() -> None:
    module = nn.Linear(3, 2)
    state_dict = {'a.weight': torch.zeros(2, 4), 'a.bias': torch.zeros(2), 'weight': torch.zeros(1)}
    assert shape_mismatches(state_dict, module, 'a.') == [
        'a.weight: (2, 4) in the checkpoint, (2, 3) in the model'
    ]
