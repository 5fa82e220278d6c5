# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What is frozen does not move: parameters, running statistics, dropout."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import (
    MMDistributedDataParallel,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import RUNNERS
from torch import Tensor, nn
from torch import distributed as dist

from mmseg_sats.models.segmentors.freeze import freeze, hold_in_eval, is_frozen
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.small_models import build, images, model_cfg, samples

CLASSIFIER = 'decode_head.conv_seg'


def droppy_cfg(**options: Any) -> dict[str, Any]:
    """A Mix Transformer with dropout of every kind, under a head with batch norm and dropout."""
    cfg = model_cfg(4, **options)
    cfg['backbone'] |= dict(drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3)
    cfg['decode_head']['dropout_ratio'] = 0.5
    return cfg


def labels() -> Tensor:
    return torch.randint(4, (2, 64, 64), generator=torch.Generator().manual_seed(0))


def moved_by_training(model: nn.Module, optimizer: dict[str, Any]) -> set[str]:
    """Names of the tensors that two steps change."""
    before = copy.deepcopy(model.state_dict())
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    model.train()
    for _ in range(2):
        loss, _ = model.parse_losses(model.loss(images(), samples(labels())))
        wrapper.update_params(loss)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize('resnet', [False, True])
@pytest.mark.parametrize('optimizer', [
    dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.1), dict(type='AdamW', lr=0.1)])
def test_no_tensor_of_a_frozen_encoder_moves(resnet: bool, optimizer: dict[str, Any]) -> None:
    free = moved_by_training(build(model_cfg(4, resnet)), optimizer)
    moved = moved_by_training(build(model_cfg(4, resnet, frozen=('backbone',))), optimizer)
    assert any(name.startswith('backbone.') for name in free)
    assert moved == {name for name in free if name.startswith('decode_head.')}
    assert 'decode_head.fusion_conv.bn.running_mean' in moved
    assert not resnet or 'backbone.bn1.running_mean' in free


def test_all_but_the_classifier() -> None:
    model = build(droppy_cfg(frozen=('*', f'!{CLASSIFIER}')))
    assert moved_by_training(model, dict(type='SGD', lr=0.1)) == {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'}
    # The head's dropout is frozen too, and the classifier alone is in train mode.
    training = {name for name, module in model.named_modules() if module.training and name}
    assert training == {CLASSIFIER}


def test_a_frozen_encoder_drops_nothing_in_train_mode() -> None:
    model = build(droppy_cfg(frozen=['backbone']))
    expected = model.eval().backbone(images())
    for feature, same in zip(model.train().backbone(images()), expected, strict=True):
        assert torch.equal(feature, same)
    assert model.training
    assert model.decode_head.dropout.training
    awake = build(droppy_cfg()).train().backbone(images())
    assert not torch.equal(awake[-1], expected[-1])


def test_a_frozen_encoder_builds_no_graph() -> None:
    model = build(model_cfg(4, frozen=('backbone',))).train()
    # Already here, so a DDP wrapper expects no gradient of it.
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert not any(feature.requires_grad for feature in model.backbone(images()))


def test_a_ddp_wrapper_waits_for_no_gradient_of_what_is_frozen(tmp_path: Path) -> None:
    """Without ``find_unused_parameters``, a second step raises where a gradient was missing."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        model = build(model_cfg(4, True, frozen=('backbone',)))
        wrapped = MMDistributedDataParallel(model, device_ids=None)
        wrapper = build_optim_wrapper(wrapped, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        wrapped.train()
        for _ in range(2):
            losses = wrapped(images(), samples(labels()), mode='loss')
            wrapper.update_params(model.parse_losses(losses)[0])
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(name.startswith('decode_head.') for name in moved)
    finally:
        dist.destroy_process_group()


def test_layers_that_are_exchanged_after_building_stay_in_eval() -> None:
    model = convert_sync_batchnorm(build(model_cfg(4, True, frozen=('backbone',)))).train()
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    revert_sync_batchnorm(model).train()
    assert not any(module.training for module in model.backbone.modules())


def test_a_copy_is_frozen_too() -> None:
    model = copy.deepcopy(build(model_cfg(4, frozen=('backbone',)))).train()
    assert not any(module.training for module in model.backbone.modules())


@pytest.mark.parametrize(('name', 'patterns', 'expected'), [
    ('backbone.layers.0', ['backbone'], True),
    ('backbone', ['backbone'], True),
    ('backbones', ['backbone'], False),
    ('decode_head.backbone', ['backbone'], False),
    ('backbone.layers.0.1.norm', ['backbone.layers.0'], True),
    ('backbone.layers.10.norm', ['backbone.layers.?'], False),
    ('a.b.c', ['*.b'], True),
    ('a.b.c', ['*', '!a.b'], False),
    ('a.c', ['*', '!a.b'], True),
    ('a.b', [], False),
])
def test_patterns(name: str, patterns: Sequence[str], expected: bool) -> None:
    assert is_frozen(name, patterns) is expected


@pytest.mark.parametrize(('patterns', 'message'), [
    (['backbon'], r"'backbon' names no part of .*did you mean 'backbone'.*decode_head"),
    (['*', '!decode_head.conv_sge'], r"'!decode_head.conv_sge' names .*'decode_head.conv_seg'"),
    (['*'], r"frozen=\['\*'\] leaves nothing of IncrementalEncoderDecoder to train"),
    ('backbone', r"frozen='backbone': expected a list of patterns, such as \['backbone'\]"),
])
def test_a_wrong_pattern_is_named(patterns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model_cfg(4, frozen=patterns))


def test_any_module_can_be_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).train()
    freeze(model, ['1', '2'])
    assert [module.training for module in model] == [True, False, False]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    model.train()
    hold_in_eval(model, ['1', '2'])
    assert [module.training for module in model] == [True, False, False]


def test_a_model_of_which_all_but_a_part_is_frozen_keeps_its_own_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    freeze(model, ['*', '!1'])
    assert [module.training for module in (model, *model)] == [True, False, True]


def test_a_pattern_may_name_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(model, ['0.weight'])
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_the_frozen_finetuning_keeps_the_encoder_of_stage_0(
    shapes_cfg: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = shapes_cfg('finetune_frozen', protocol='3-3', image_size=64, train_images=24)
    RUNNERS.build(cfg).train()
    old, new = (
        load_checkpoint_safely(tmp_path / f'run/stage_{index}/snapshot.pth')['state_dict']
        for index in (0, 1)
    )
    encoder = [name for name in old if name.startswith('backbone.')]
    assert encoder
    assert all(torch.equal(old[name], new[name]) for name in encoder)
    assert not torch.equal(old['decode_head.convs.0.conv.weight'], new['decode_head.convs.0.conv.weight'])
