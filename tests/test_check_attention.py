# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What is right passes, and each of the usual mistakes of a forward_with_attention is named with its block."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.engine.checks.attention import check_backbone_attention
from mmseg_sats.models import check_attention
from mmseg_sats.models.attention import AttentionMap, WindowAttentionMap, Windows
from mmseg_sats.models.backbones import (
    AttentionMixVisionTransformer,
    AttentionSwinTransformer,
    attend_with_map,
)
from tests.test_attention_backbones import CASES, IDS, PAIRS
from tests.test_attention_mit import SMALL as MIT
from tests.test_attention_mit import images
from tests.test_attention_swin import SMALL as SWIN

MakeConfig = Callable[..., Config]
OWN = {name: (PAIRS[kind][1], options) for name, (kind, options) in zip(IDS, CASES, strict=True)}
OWN |= {'mit': (AttentionMixVisionTransformer, MIT), 'swin': (AttentionSwinTransformer, SWIN)}


@pytest.mark.parametrize('layers', ['last', 'all'])
@pytest.mark.parametrize('name', OWN)
def test_our_own_are_right(name: str, layers: str) -> None:
    kind, options = OWN[name]
    backbone = kind(**options, attention_layers=layers)
    weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    report = check_attention(backbone, images(64, 96, batch=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
    assert backbone.training
    assert report.dtype == torch.float64
    assert report.images == (2, 3, 64, 96)
    assert len(report.blocks) == len(backbone.forward_with_attention(images(64, 96))[1])
    assert max(block.difference for block in report.blocks) < 1e-12
    text = str(report)
    assert text.count('\n') == len(report.blocks)
    assert f'equals softmax {report.blocks[-1].layer} of {report.layers}' in text


class Plain(nn.Module):
    """Patches of 8 x 8 and two layers; ``wrong`` changes what is handed out, not what is computed."""

    kernel = 'softmax'

    def __init__(self, wrong: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(2, 1, 1))
        self.wrong = wrong

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._run(x)[0]

    def forward_with_attention(self, x: Tensor) -> Any:
        features, maps = self._run(x)
        return (features, maps) if self.wrong is None else self.wrong(features, maps)

    def _run(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[AttentionMap, ...]]:
        x = self.patch(x)
        features, maps, hw = [], [], x.shape[2:]
        for qkv in self.qkv:
            tokens = x.flatten(2).mT
            query, key, value = qkv(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = self.attend(query, key, value).transpose(1, 2).flatten(2).mT.unflatten(2, hw)
            features.append(x)
            maps.append(AttentionMap(query, key, 0.5, hw, hw))
        return tuple(features), tuple(maps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * 0.5).softmax(-1) @ value


class Fused(Plain):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Biased(Plain):
    """A bias that is 0 as long as nobody has trained it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(key.shape[2], device=key.device) / key.shape[2]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias * places)


class InWindows(Plain):
    """Within windows of 4 x 4, of 8 x 12 places."""

    cut = Windows((8, 12), (4, 4))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (in_windows(own, self.cut) for own in (query, key, value))
        out = ((query @ key.mT * 0.5).softmax(-1) @ value).transpose(1, 2).flatten(2, 3)
        return out.index_select(2, self.cut.slots(out.device))


def in_windows(tokens: Tensor, windows: Windows) -> Tensor:
    """(B, windows, heads, tokens, d) of (B, heads, L, d)"""
    keys = windows.keys(tokens.device)
    return tokens[:, :, keys].transpose(1, 2)


class Exotic(Plain):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT * 0.5).exp()
        return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize('kind', [Plain, Fused])
def test_softmax_and_fused_kernels_are_heard(kind: type) -> None:
    report = check_attention(kind(), images(64, 96))
    assert [block.layer for block in report.blocks] == [1, 2]


def test_torchs_own_layers_are_heard_on_their_fast_path() -> None:
    class Torchs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 8, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            x = self.patch(x)
            return (self.layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:]),)

        def forward_with_attention(self, x: Tensor) -> tuple[tuple[Tensor], tuple[AttentionMap]]:
            tokens = self.patch(x)
            attention = attend_with_map(self.layer.self_attn, tokens.flatten(2).mT, tokens.shape[2:])[1]
            return self(x), (attention,)

    assert len(check_attention(Torchs(), images(64, 96)).blocks) == 1


def test_windows_are_compared_window_by_window() -> None:
    def right(features: Any, maps: Any) -> Any:
        return features, tuple(
            WindowAttentionMap(in_windows(own.query, InWindows.cut), in_windows(own.key, InWindows.cut), 0.5,
                               InWindows.cut)
            for own in maps
        )

    assert len(check_attention(InWindows(right), images(64, 96)).blocks) == 2
    with pytest.raises(ValueError, match=r'block 0: no layer computed .*\(2, 6, 2, 16, 16\).*WindowAttentionMap'):
        check_attention(InWindows(), images(64, 96))


def last_is(change: Callable[[AttentionMap], Any]) -> Callable[..., Any]:
    return lambda features, maps: (features, (maps[0], change(maps[1])))


def heads_with_images(own: AttentionMap) -> AttentionMap:
    query, key = (value.flatten(0, 1).unsqueeze(1) for value in (own.query, own.key))
    return replace(own, query=query, key=key)


def heads_before_images(own: AttentionMap) -> AttentionMap:
    query, key = (value.transpose(0, 1).reshape(value.shape) for value in (own.query, own.key))
    return replace(own, query=query, key=key)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    'swapped': (last_is(lambda own: replace(own, query=own.key, key=own.query)), 'query and key swapped'),
    'scale': (last_is(lambda own: replace(own, scale=1.0)), 'another scale'),
    'heads with images': (last_is(heads_with_images), 'expected a map of 2 images'),
    'heads before images': (last_is(heads_before_images), 'in another order'),
    'heads turned round': (last_is(lambda own: replace(own, query=own.query.flip(1), key=own.key.flip(1))), 'heads'),
    'twice': (lambda features, maps: (features, (maps[0], maps[0])), 'differs by'),
    'grid': (last_is(lambda own: replace(own, query_hw=(12, 8))), r'\(12, 8\) has other proportions .* \(8, 12\)'),
    'row': (last_is(lambda own: replace(own, query_hw=(1, 96))), 'other proportions'),
    'fewer heads': (last_is(lambda own: replace(own, query=own.query[:, :1], key=own.key[:, :1])), 'no layer computed'),
    'dense': (last_is(lambda own: own.dense()), r'expected an AttentionMap .*, got Tensor \(2, 2, 96, 96\)'),
    'nan': (last_is(lambda own: replace(own, query=own.query * math.nan)), 'not finite'),
}


@pytest.mark.parametrize('name', WRONG)
def test_the_usual_mistakes_are_named_with_their_block(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=f'block 1: .*{message}'):
        check_attention(Plain(wrong), images(64, 96))


def test_a_single_image_shows_heads_mixed_up_with_images() -> None:
    with pytest.raises(ValueError, match='block 1: '):
        check_attention(Plain(WRONG['heads before images'][0]), images(64, 96, batch=1))


def test_a_bias_that_starts_at_zero_is_missed() -> None:
    with pytest.raises(ValueError, match=r'block 0: .* a bias on the scores left out'):
        check_attention(Biased(), images(64, 96))


def test_features_must_be_those_of_forward() -> None:
    with pytest.raises(ValueError, match='features 1: forward_with_attention gives others than forward'):
        check_attention(Plain(lambda features, maps: ((features[0], features[1] * 1.01), maps)), images(64, 96))
    with pytest.raises(ValueError, match='returns 1 features, forward 2'):
        check_attention(Plain(lambda features, maps: (features[:1], maps)), images(64, 96))
    with pytest.raises(ValueError, match=r'features 0: expected \(2, 8, 8, 12\) as from forward, got \(2, 4, 8, 12\)'):
        check_attention(Plain(lambda features, maps: ((features[0][:, :4], features[1]), maps)), images(64, 96))


def test_what_cannot_be_heard_does_not_pass() -> None:
    with pytest.raises(ValueError, match='no map of Exotic could be compared'):
        check_attention(Exotic(), images(64, 96))


def test_what_is_no_pair_of_features_and_maps_is_named() -> None:
    for wrong, message in (
        (lambda features, maps: features, 'attentions must be a tuple .*, got Tensor'),
        (lambda features, maps: features[:1], r'must return \(features, attentions\), got tuple of 1'),
        (lambda features, maps: (features, ()), 'attentions must be a tuple of attention maps'),
        (lambda features, maps: (features, maps[0]), 'attentions must be a tuple .*, got AttentionMap'),
        (lambda features, maps: None, 'got NoneType'),
    ):
        with pytest.raises(ValueError, match=message):
            check_attention(Plain(wrong), images(64, 96))
    with pytest.raises(ValueError, match='Conv2d has no forward_with_attention'):
        check_attention(nn.Conv2d(3, 8, 1), images(64, 96))
    with pytest.raises(ValueError, match='image must be floating point numbers'):
        check_attention(Plain(), torch.zeros(3, 8, 8))


def test_a_backbone_that_is_float32_for_good_is_compared_in_float32() -> None:
    class Single(Plain):
        def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.ones(query.shape[2], query.shape[2]) * 1.0 @ value if query.dtype == torch.float64 else (
                super().attend(query, key, value))

    assert check_attention(Single(), images(64, 96)).dtype == torch.float32
    with pytest.raises(ValueError, match=r'block 1: .*another scale'):
        check_attention(Single(WRONG['scale'][0]), images(64, 96))


# Before stage 0 is trained


@MODELS.register_module()
class WrongMiT(AttentionMixVisionTransformer):
    """Hands out what ``wrong`` makes of features and maps."""

    wrong: Callable[..., Any]

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward_with_attention(x)[0]

    def forward_with_attention(self, x: Tensor) -> Any:
        return type(self).wrong(*super().forward_with_attention(x))


def fail(*_: Any) -> None:
    raise RuntimeError('the dog ate the queries')


BEFORE_STAGE_0 = {
    'grid': (lambda features, maps: (features, (*maps[:3], replace(maps[3], query_hw=(4, 1)))), 'block 3: its grid'),
    'type': (lambda features, maps: (features, (*maps[:2], maps[2].dense(), maps[3])), 'block 2: expected an'),
    'positions': (
        lambda features, maps: (features, (replace(maps[0], query=maps[0].query[:, :, 1:]), *maps[1:])),
        'fails on an image .* does not hold 255 positions',
    ),
    'images': (
        lambda features, maps: (features, (*maps[:3], heads_with_images(maps[3]))), 'block 3: expected a map of 1 im'
    ),
    'raises': (fail, 'RuntimeError: the dog ate the queries'),
}


@pytest.mark.parametrize('name', BEFORE_STAGE_0)
def test_a_wrong_backbone_is_refused_before_stage_0(name: str, shapes_cfg: MakeConfig) -> None:
    WrongMiT.wrong, message = staticmethod(BEFORE_STAGE_0[name][0]), BEFORE_STAGE_0[name][1]
    cfg = shapes_cfg('sats')
    cfg.model.backbone.type = 'WrongMiT'
    with pytest.raises(ValueError, match=f'model.backbone: WrongMiT.forward_with_attention .*{message}'):
        RUNNERS.build(cfg)


def test_blocks_that_there_are_not_are_refused_before_stage_0(shapes_cfg: MakeConfig) -> None:
    cfg = shapes_cfg('sats')
    cfg.distillation.attention.blocks = [0, 4]
    with pytest.raises(ValueError, match=r'distillation.attention.blocks=\[0, 4\]: the backbone hands out 4 '):
        RUNNERS.build(cfg)


def test_a_method_without_attention_does_not_ask(shapes_cfg: MakeConfig) -> None:
    WrongMiT.wrong = staticmethod(fail)
    for method, source in (('finetune', None), ('sats', 'feature')):
        cfg = shapes_cfg(method, method)
        cfg.model.backbone.type = 'WrongMiT'
        if source:
            cfg.distillation.attention.source = source
        RUNNERS.build(cfg)


class FixedSize(Plain):
    """Takes images of one size alone, and is filled by init_weights."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.full((1, 3, 192, 256), math.nan))
        self.sizes: list[tuple[int, ...]] = []
        self.norm = nn.BatchNorm2d(3)

    def init_weights(self) -> None:
        nn.init.zeros_(self.place)

    def _run(self, x: Tensor) -> Any:
        self.sizes.append(tuple(x.shape))
        assert not self.norm.training
        return super()._run(self.norm(x) + self.place)


def test_a_legal_backbone_of_one_size_is_not_refused_and_random_numbers_stay() -> None:
    model = nn.Module()
    model.backbone = FixedSize()
    model.distillation = nn.ModuleDict(
        dict(attention=MODELS.build(dict(type='CRPDistillationLoss', blocks=(0, 1))))
    )
    cfg = Config(dict(crop_size=[192, 256], model=dict(backbone=dict(type='FixedSize'))))
    state = torch.get_rng_state()
    check_backbone_attention(cfg, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.backbone.sizes == [(1, 3, 128, 128), (1, 3, 192, 256), (1, 3, 192, 256)]
    assert model.backbone.training
    assert model.backbone.norm.training


def test_the_size_is_the_backbones_where_the_config_has_none() -> None:
    model = nn.Module()
    model.backbone = FixedSize()
    model.backbone.img_size = (192, 256)
    model.backbone.init_weights()
    model.distillation = nn.ModuleDict(
        dict(attention=MODELS.build(dict(type='CRPDistillationLoss', blocks=(0, 1))))
    )
    check_backbone_attention(Config(dict(model=dict(backbone=dict(type='FixedSize')))), model)
    assert model.backbone.sizes[-1] == (1, 3, 192, 256)
