# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ViT and Twins with attention are the stock ones, and their attention is the stock one's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmengine.registry import init_default_scope
from mmseg.models.backbones import PCPVT, SVT, VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.models.backbones import (
    AttentionPCPVT,
    AttentionSVT,
    AttentionVisionTransformer,
    attend_with_map,
)
from mmseg_sats.models.backbones.self_attention import self_attention
from mmseg_sats.models.losses import crp_loss
from mmseg_sats.models.segmentors.old_model import run_segmentor
from tests.small_models import CROSS_ENTROPY
from tests.test_attention_mit import images, parameter_gradients, stock_attention

VIT: dict[str, Any] = dict(
    img_size=(32, 48), patch_size=16, embed_dims=16, num_layers=4, num_heads=2, out_indices=(0, 2, 3)
)
PYRAMID: dict[str, Any] = dict(
    embed_dims=[8, 8, 16, 16], num_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2], sr_ratios=[4, 2, 2, 1]
)
PAIRS: dict[str, tuple[type, type]] = {
    'vit': (VisionTransformer, AttentionVisionTransformer),
    'pcpvt': (PCPVT, AttentionPCPVT),
    'svt': (SVT, AttentionSVT),
}
SVT_OPTIONS = dict(PYRAMID, depths=[2, 4, 3, 2], windiow_sizes=[3, 7, 3, 7], drop_path_rate=0.0)
CASES: list[tuple[str, dict[str, Any]]] = [
    ('vit', VIT),
    ('vit', VIT | dict(with_cls_token=False, final_norm=True)),
    ('vit', VIT | dict(pre_norm=True, out_origin=True, patch_size=8, qkv_bias=False)),
    ('pcpvt', PYRAMID | dict(depths=[2, 1, 1, 2])),
    ('pcpvt', PYRAMID | dict(depths=[1, 1, 2, 1], qkv_bias=True, norm_after_stage=True)),
    ('svt', SVT_OPTIONS),
    ('svt', SVT_OPTIONS | dict(qkv_bias=True, out_indices=(1, 3))),
]
IDS = [f'{name}-{number}' for number, (name, _) in enumerate(CASES)]
SIZES = [(32, 48), (64, 64), (75, 101)]


def make_pair(name: str, options: dict[str, Any], **own_options: Any) -> tuple[nn.Module, nn.Module]:
    """Stock and own backbone with the same random parameters, in eval mode."""
    stock_type, own_type = PAIRS[name]
    torch.manual_seed(0)
    stock = stock_type(**options)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    own = own_type(**options, **own_options)
    own.load_state_dict(stock.state_dict(), strict=True)
    # mmseg's ViT returns nothing from train() and eval().
    for model in (stock, own):
        model.eval()
    return stock, own


def block_ends(name: str, options: dict[str, Any]) -> list[int]:
    """Where among the layers with global attention each block has its last."""
    if name == 'vit':
        return list(options['out_indices'])
    depths = [depth // 2 if name == 'svt' else depth for depth in options['depths']]
    return (torch.tensor(depths).cumsum(0) - 1).tolist()


def scalar(features: tuple[Tensor, ...]) -> Tensor:
    return sum((feature * feature.detach().cos()).mean() for feature in features)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
@pytest.mark.parametrize('size', SIZES)
def test_features_are_those_of_stock(name: str, options: dict, size: tuple[int, int]) -> None:
    stock, own = make_pair(name, options)
    with torch.no_grad():
        expected, got = stock(images(*size)), own(images(*size))
        with_attention, _ = own.forward_with_attention(images(*size))
    assert type(got) is type(expected)
    for mine, again, theirs in zip(got, with_attention, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again, mine)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_gradients_are_those_of_stock(name: str, options: dict) -> None:
    stock, own = (model.double() for model in make_pair(name, options))
    for model in (stock, own):
        scalar(model(images(45, 67).double())).backward()
    expected = parameter_gradients(stock)
    for key, gradient in parameter_gradients(own).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-9, rtol=1e-7, msg=key)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
@pytest.mark.parametrize('layers', ['last', 'all'])
def test_attention_is_that_of_stock(name: str, options: dict, layers: str) -> None:
    """Asked of nn.MultiheadAttention with need_weights; the class token's own row is left out."""
    stock, own = make_pair(name, options, attention_layers=layers)
    with torch.no_grad():
        expected = stock_attention(stock, images(75, 101))
        _, attentions = own.forward_with_attention(images(75, 101))
    if layers == 'last':
        expected = [expected[end] for end in block_ends(name, options)]
    extra = int(name == 'vit' and options.get('with_cls_token', True))
    assert len(attentions) == len(expected)
    for mine, theirs in zip(attentions, expected, strict=True):
        assert mine.extra_keys == extra
        torch.testing.assert_close(mine.dense(), theirs[:, :, extra:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_maps_lie_on_the_grids_of_the_features(name: str, options: dict) -> None:
    _, own = make_pair(name, options)
    features, attentions = own.forward_with_attention(images(75, 101))
    if len(features) == len(attentions):
        grids = [tuple(feature.shape[2:]) for feature in features]
        assert [attention.query_hw for attention in attentions] == grids
    detached = attentions[0].detach()
    assert detached.extra_keys == attentions[0].extra_keys
    assert detached.query.requires_grad is False
    torch.testing.assert_close(detached.dense().sum(-1), torch.ones(detached.shape[:3]))


@pytest.mark.parametrize(('name', 'options'), [CASES[0], CASES[3], CASES[5]], ids=['vit', 'pcpvt', 'svt'])
def test_transfer_trains_queries_and_keys_and_knows_a_different_teacher(name: str, options: dict) -> None:
    stock, student = make_pair(name, options)
    teacher = PAIRS[name][1](**options)
    teacher.load_state_dict({key: 1.1 * value for key, value in stock.state_dict().items()})
    labels = torch.randint(0, 3, (2, 64, 96), generator=torch.Generator().manual_seed(2))
    new = student.forward_with_attention(images())[1]
    teacher.eval()
    old = teacher.forward_with_attention(images())[1]
    torch.testing.assert_close(crp_loss(new, new, labels), torch.zeros(()))
    crp_loss(new, old, labels).backward()
    last = [module for module in student.modules() if isinstance(module, nn.MultiheadAttention)][-1]
    query, key, value = last.in_proj_weight.grad.chunk(3)
    assert query.abs().sum() > 0
    assert key.abs().sum() > 0
    assert value.abs().sum() == 0


@pytest.mark.parametrize(('name', 'options'), [CASES[0], CASES[5]], ids=['vit', 'svt'])
def test_attention_is_taken_before_attention_dropout(name: str, options: dict) -> None:
    _, own = make_pair(name, options | dict(attn_drop_rate=0.5))
    quiet = own(images())[-1]
    own.train()
    first = own.forward_with_attention(images())[1][0]
    torch.testing.assert_close(first.dense().sum(-1), torch.ones(first.shape[:3]))
    assert not torch.allclose(own(images())[-1], quiet)


@pytest.mark.parametrize(('name', 'options'), [CASES[0], CASES[3], CASES[5]], ids=['vit', 'pcpvt', 'svt'])
def test_stochastic_depth_drops_the_same_branches_as_stock(name: str, options: dict) -> None:
    stock, own = make_pair(name, options | dict(drop_path_rate=0.6))
    for model in (stock, own):
        model.train()
    torch.manual_seed(5)
    expected = stock(images())
    torch.manual_seed(5)
    for mine, theirs in zip(own(images()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_dropout_behind_the_output_projection_is_at_work_in_training() -> None:
    module = MultiheadAttention(8, 2, proj_drop=1.0, batch_first=True).train()
    x = torch.randn(2, 6, 8)
    assert torch.equal(self_attention(module, x, (2, 3), identity=x)[0], x)


@pytest.mark.parametrize(('name', 'options'), [CASES[3], CASES[5]], ids=['pcpvt', 'svt'])
def test_all_tokens_of_twins_pass_the_dropout_behind_their_patch_embedding(name: str, options: dict) -> None:
    _, own = make_pair(name, options)
    used = []
    for drop in own.position_encoding_drops:
        drop.register_forward_hook(lambda *_: used.append(1))
    own(images())
    assert len(used) == 4


def test_vit_checkpointing_gives_the_same_gradients() -> None:
    _, plain = make_pair('vit', VIT)
    _, saving = make_pair('vit', VIT | dict(with_cp=True))
    for model in (plain, saving):
        model.train()
        features, attentions = model.forward_with_attention(images())
        (scalar(features) + sum(a.dense().square().sum() for a in attentions)).backward()
    expected = parameter_gradients(plain)
    for key, gradient in parameter_gradients(saving).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5, msg=key)


def test_vit_gives_the_class_token_where_it_is_asked_for() -> None:
    stock, own = make_pair('vit', VIT | dict(output_cls_token=True))
    for mine, theirs in zip(own(images()), stock(images()), strict=True):
        assert type(mine) is type(theirs) is list
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', PAIRS)
def test_built_from_the_registry_with_pretrained_weights(name: str, tmp_path) -> None:
    init_default_scope('mmseg')
    options = dict(CASES)[name]
    stock, _ = make_pair(name, options)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    own = MODELS.build(dict(type=PAIRS[name][1].__name__, init_cfg=init_cfg, **options))
    own.init_weights()
    for key, tensor in own.state_dict().items():
        torch.testing.assert_close(tensor, stock.state_dict()[key], msg=key)


@pytest.mark.parametrize('own', [pair[1] for pair in PAIRS.values()])
def test_unknown_attention_layers_are_refused(own: type) -> None:
    with pytest.raises(ValueError, match=r"'lst' is unknown \(did you mean 'last'\?\)"):
        own(attention_layers='lst')


def test_a_stage_without_a_global_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r'stage 2 of AttentionSVT has no global layer.*2, 2, 1, 2'):
        AttentionSVT(**SVT_OPTIONS | dict(depths=[2, 2, 1, 2]))


def test_attention_with_other_projections_is_refused() -> None:
    for options in (dict(kdim=6), dict(add_bias_kv=True), dict(add_zero_attn=True)):
        with pytest.raises(ValueError, match='one packed projection and no added keys'):
            attend_with_map(nn.MultiheadAttention(8, 2, **options), torch.zeros(1, 4, 8), (2, 2))


def test_attend_with_map_is_torchs_attention() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x, context = torch.randn(2, 7, 8), torch.randn(2, 4, 8)
    expected, weights = module(x, context, context, average_attn_weights=False)
    out, attention = attend_with_map(module, x, (2, 3), context=context, key_hw=(2, 2), extra_tokens=1)
    torch.testing.assert_close(out, expected)
    assert attention.extra_keys == 0
    torch.testing.assert_close(attention.dense(), weights[:, :, 1:])


def test_keys_without_a_place_are_pooled_like_any_other() -> None:
    _, own = make_pair('vit', VIT)
    attention = own.forward_with_attention(images(48, 80))[1][1].detach()
    assert (attention.query_hw, attention.key_hw, attention.extra_keys) == ((3, 5), (3, 5), 1)
    labels = torch.tensor([[0, 1, 1, 2, 255]] * 3).expand(2, -1, -1)
    means, image, label = attention.pool(labels)
    assert means.shape == (4, 2, 1 + 15)
    dense = attention.dense()
    for mean, i, c in zip(means, image, label, strict=True):
        expected = dense[i, :, (labels[i] == c).flatten()].mean(1)
        torch.testing.assert_close(mean, expected)
    with pytest.raises(ValueError, match=r'key_hw \(3, 5\) does not hold 16 positions'):
        replace(attention, extra_keys=0)


def test_features_behind_a_neck_are_the_backbones() -> None:
    init_default_scope('mmseg')
    head = dict(type='UPerHead', in_channels=[8] * 3, in_index=[0, 1, 2], channels=8, num_classes=4,
                norm_cfg=dict(type='BN'), loss_decode=CROSS_ENTROPY)
    neck = dict(type='MultiLevelNeck', in_channels=[16] * 3, out_channels=8, scales=[2, 1, 0.5])
    model = MODELS.build(
        dict(type='IncrementalEncoderDecoder', backbone=dict(VIT, type='AttentionVisionTransformer'),
             neck=neck, decode_head=head, distillation=dict(attention=dict(
                 type='CRPDistillationLoss', source='both', blocks=(0, 1, 2))))
    ).eval()
    with torch.no_grad():
        output, head_inputs = run_segmentor(model, images(64, 96), with_attention=True)
        expected = model.backbone(images(64, 96))
        for feature, theirs, after in zip(output.features, expected, head_inputs, strict=True):
            assert torch.equal(feature, theirs)
            assert after.shape[1] == 8
        assert torch.equal(output.logits, model(images(64, 96), mode='tensor'))
    grids = [attention.query_hw for attention in output.attentions]
    assert grids == [tuple(feature.shape[2:]) for feature in output.features] == [(4, 6)] * 3
