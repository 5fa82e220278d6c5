# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What is done to the weights between two stages: fusion with the old ones (EWF), and aligned rows."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, RUNNERS
from torch import Tensor, nn

from mmseg_sats.engine.hooks.methods.weight_fusion_hook import fused
from mmseg_sats.protocol import Protocol
from tests.runs import train_interrupted_in_stage_1, weights
from tests.small_models import (
    RESNET_CHANNELS,
    auxiliary_head_cfg,
    build,
    decode_head_cfg,
    model_cfg,
    save_weights,
)

STAGE = Protocol('3-2', num_classes=5).stages[1]  # 4 channels before, 6 after
SHARE = math.sqrt(2 / 5)
ROWS = ('conv_seg.weight', 'conv_seg.bias')
LAST = dict(in_channels=32, in_index=3, channels=8, norm_cfg=dict(type='BN'))
CASCADE = [dict(LAST, type='FCNHead'), dict(LAST, type='OCRHead', ocr_channels=4)]
TOKENS = dict(type='SegmenterMaskTransformerHead', in_channels=32, in_index=3, channels=8, num_layers=1, num_heads=2,
              embed_dims=8)  # fmt: skip

# Options of the model by its channels; the names of the tensors with a row for each class.
MODELS: dict[str, tuple[Callable[[int], dict[str, Any]], set[str]]] = {
    'one head': (lambda k: {}, {f'decode_head.{key}' for key in ROWS}),
    'a list of heads': (
        lambda k: dict(auxiliary_head=[auxiliary_head_cfg(k), auxiliary_head_cfg(k, 2)]),
        {f'{head}.{key}' for head in ('decode_head', 'auxiliary_head.0', 'auxiliary_head.1') for key in ROWS},
    ),
    'batch norms': (
        lambda k: dict(resnet=True, decode_head=decode_head_cfg(k, RESNET_CHANNELS)),
        {f'decode_head.{key}' for key in ROWS},
    ),
    'an unknown class': (
        lambda k: dict(unknown=True, frozen=('backbone',)), {f'decode_head.{key}' for key in ROWS}
    ),
    'a cascade': (
        lambda k: dict(decode_head=dict(type='CascadeHead', heads=CASCADE, num_classes=k)),
        {f'decode_head.{index}.{key}' for index in (0, 1) for key in ROWS},
    ),
    'class tokens': (
        lambda k: dict(decode_head=dict(TOKENS, num_classes=k)),
        {'decode_head.cls_emb', 'decode_head.mask_norm.weight', 'decode_head.mask_norm.bias'},
    ),
}  # fmt: skip


def two_models(name: str, tmp_path: Path) -> tuple[dict[str, Tensor], nn.Module, str, set[str]]:
    """An old model's weights, the model of the next stage with other weights, the old file, and its class tensors."""
    options, rows = MODELS[name]
    old = build(model_cfg(4, **options(4)), seed=0)
    path = save_weights(old, tmp_path / 'snapshot.pth')
    new = build(model_cfg(6, **options(6), old_model=dict(checkpoint=path, num_old=4)), seed=1)
    for number, value in enumerate(new.buffers()):
        value.fill_(number + 2)  # running statistics that differ from the old ones
    for value in new.parameters():
        value.data += torch.randn(value.shape)
    return old.state_dict(), new, path, rows


def before_snapshot(model: nn.Module, path: str, hook: str, stage: Any = STAGE, **options: Any) -> None:
    runner = SimpleNamespace(model=model, start_from=path, logger=MMLogger.get_current_instance())
    HOOKS.build(dict(type=hook, **options)).before_snapshot(runner, stage)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize('name', MODELS)
def test_fusion_of_every_tensor(name: str, tmp_path: Path) -> None:
    old, model, path, rows = two_models(name, tmp_path)
    trained = state(model)
    before_snapshot(model, path, 'WeightFusionHook')
    kept = model.state_dict()
    assert {key for key in kept if kept[key].shape != old[key].shape} == rows
    for key, value in kept.items():
        expected = trained[key].clone()
        dim = next((d for d, size in enumerate(value.shape) if size != old[key].shape[d]), None)
        if value.is_floating_point():
            known = tuple(slice(size) for size in old[key].shape)
            expected[known] = (1 - SHARE) * old[key] + SHARE * trained[key][known]
        torch.testing.assert_close(value, expected, msg=lambda text, key=key: f'{key}: {text}')
        if dim is not None:  # rows of new classes are untouched to the bit
            new = (value.narrow(dim, 4, 2), trained[key].narrow(dim, 4, 2))
            assert torch.equal(*new)
            assert not torch.equal(value, trained[key])
    counters = [key for key in kept if not kept[key].is_floating_point()]
    assert all(torch.equal(kept[key], trained[key]) for key in counters)
    assert counters or name == 'class tokens'


# The options before and after, and which rows of the tensor are the same ones.
BESIDE = {
    'residual': (dict(background_residuals=1), dict(background_residuals=2), slice(0, 1), slice(0, 1)),
    'future': (dict(future_classes=3, classifier_init='future'), dict(future_classes=1, classifier_init='future'),
               slice(2, 3), slice(0, 1)),
}  # fmt: skip


@pytest.mark.parametrize('name', BESIDE)
def test_rows_beside_those_of_the_classes(name: str, tmp_path: Path) -> None:
    before, after, old_rows, rows = BESIDE[name]
    old = build(model_cfg(4, **before, old_model=None), seed=0)
    path = save_weights(old, tmp_path / 'snapshot.pth')
    model = build(model_cfg(6, **after, old_model=dict(checkpoint=path, num_old=4)), seed=1)
    trained = state(model)
    before_snapshot(model, path, 'WeightFusionHook')
    for kind in ('weight', 'bias'):
        key = f'decode_head.conv_seg.{name}.{kind}'
        expected = trained[key].clone()
        expected[rows] = (1 - SHARE) * old.state_dict()[key][old_rows] + SHARE * trained[key][rows]
        torch.testing.assert_close(model.state_dict()[key], expected)


def test_fixed_weight_and_stage_0(tmp_path: Path) -> None:
    old, model, path, _ = two_models('one head', tmp_path)
    trained = state(model)
    before_snapshot(model, path, 'WeightFusionHook', stage=Protocol('5-1', num_classes=6).stages[0])
    before_snapshot(model, path, 'ClassifierAligningHook', stage=Protocol('5-1', num_classes=6).stages[0])
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    before_snapshot(model, path, 'WeightFusionHook', new_weight=0.25)
    key = 'backbone.layers.0.0.projection.weight'
    torch.testing.assert_close(model.state_dict()[key], 0.75 * old[key] + 0.25 * trained[key])


def test_only_the_entries_that_moved_most_are_fused() -> None:
    old = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    new = torch.tensor([[1.0, -9.0, 2.0], [8.0, 0.5, -3.0], [7.0, 0.0, 4.0]])
    expected = torch.tensor([[1.0, -4.5, 2.0], [4.0, 0.5, -3.0], [3.5, 0.0, 2.0]])
    assert torch.equal(fused(old, new, 0.5, 0.45), expected)  # round(0.45 * 9) = 4
    assert torch.equal(fused(old, new, 0.5, 1.0), new / 2)
    assert torch.equal(fused(new, new, 0.3), new)  # what is frozen does not move by a bit


def test_the_share_is_of_the_rows_that_the_old_model_has(tmp_path: Path) -> None:
    old, model, path, _ = two_models('one head', tmp_path)
    trained = state(model)
    before_snapshot(model, path, 'WeightFusionHook', share=0.5)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            changed = int((value != trained[key]).sum())
            assert changed == round(0.5 * old[key].numel()), key


@pytest.mark.parametrize(('option', 'value'), [('new_weight', 0), ('new_weight', 1.5), ('share', 0.0), ('share', True)])
def test_impossible_numbers_are_named(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf'WeightFusionHook: {option}={value}, expected a number in \(0, 1\]'):
        HOOKS.build(dict(type='WeightFusionHook', **{option: value}))


@pytest.mark.parametrize('name', ['a list of heads', 'an unknown class', 'a cascade'])
def test_rows_of_new_classes_are_as_long_as_those_of_old_ones(name: str, tmp_path: Path) -> None:
    _, model, path, rows = two_models(name, tmp_path)
    trained = state(model)
    before_snapshot(model, path, 'ClassifierAligningHook')
    for key, value in model.state_dict().items():
        if key not in rows or key.endswith('.bias'):
            assert torch.equal(value, trained[key])
            continue
        lengths = [math.sqrt(sum(entry**2 for entry in row.flatten().tolist())) for row in trained[key]]
        factor = (sum(lengths[1:4]) / 3) / (sum(lengths[4:]) / 2)
        assert torch.equal(value[:4], trained[key][:4])
        torch.testing.assert_close(value[4:], factor * trained[key][4:])


def test_rows_of_zeros_cannot_be_aligned(tmp_path: Path) -> None:
    _, model, path, _ = two_models('one head', tmp_path)
    nn.init.zeros_(model.decode_head.conv_seg.weight)
    with pytest.raises(ValueError, match=r'rows of new classes in decode_head\.conv_seg\.weight are 0'):
        before_snapshot(model, path, 'ClassifierAligningHook')


def test_a_run_fuses_what_it_keeps_killed_and_resumed_too(
    shapes_cfg: Callable[..., Config], tmp_path: Path
) -> None:
    options = dict(protocol='3-3', epochs=2, image_size=48, crop_size=48, train_images=12, val_images=4)
    RUNNERS.build(shapes_cfg('ewf', **options)).train()
    stage = tmp_path / 'run/stage_1'
    old, trained, kept = (
        weights(path) for path in (tmp_path / 'run/stage_0/snapshot.pth', stage / 'epoch_2.pth', stage / 'snapshot.pth')
    )
    for key, value in kept.items():
        known = slice(4) if '.conv_seg.' in key else ...
        if value.is_floating_point():
            torch.testing.assert_close(value[known], torch.lerp(old[key], trained[key][known], (1 / 2) ** 0.5))
    ended = shapes_cfg('ewf', 'killed', **options)
    train_interrupted_in_stage_1(ended)
    again = weights(tmp_path / 'killed/stage_1/snapshot.pth')
    assert all(torch.equal(again[key], value) for key, value in kept.items())
    # Stopped behind the snapshot: it is not fused again.
    for name in ('done', 'metrics.json'):
        (tmp_path / 'killed/stage_1' / name).unlink()
    RUNNERS.build(ended).train()
    again = weights(tmp_path / 'killed/stage_1/snapshot.pth')
    assert all(torch.equal(again[key], value) for key, value in kept.items())
