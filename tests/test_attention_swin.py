# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Swin with attention is the stock one, and its attention is the stock one's, shift and padding included."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope
from mmseg.models.backbones import SwinTransformer
from mmseg.models.backbones.swin import ShiftWindowMSA
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.models.attention import WindowAttentionMap
from mmseg_sats.models.backbones import AttentionSwinTransformer
from mmseg_sats.models.losses import crp_loss
from tests.test_attention_backbones import scalar
from tests.test_attention_mit import images, parameter_gradients

SMALL: dict[str, Any] = dict(
    embed_dims=8, num_heads=[1, 2, 2, 4], depths=[2, 1, 3, 2], window_size=4, mlp_ratio=2, drop_path_rate=0.0
)
CASES = {
    'small': SMALL,
    'window_7': SMALL | dict(window_size=7, depths=[1, 2, 2, 1], qkv_bias=False, patch_norm=False),
    'some_outputs': SMALL | dict(out_indices=(1, 3), qk_scale=0.3, window_size=3),
}
# 64 x 96 needs no padding of windows of 4 but in the last stage; the others are padded everywhere.
SIZES = [(64, 96), (75, 101), (33, 40)]


def make_pair(options: dict[str, Any], **own_options: Any) -> tuple[SwinTransformer, AttentionSwinTransformer]:
    """Stock and own backbone with the same random parameters, in eval mode."""
    torch.manual_seed(0)
    stock = SwinTransformer(**options)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    own = AttentionSwinTransformer(**options, **own_options)
    own.load_state_dict(stock.state_dict(), strict=True)
    for model in (stock, own):  # mmseg's returns nothing from train() and eval()
        model.eval()
    return stock, own


def stock_attention(stock: SwinTransformer, x: Tensor) -> list[Tensor]:
    """Each layer's map over the image: what its softmax gave, put in place by mmseg's own cut of the grid."""
    weights: list[Tensor] = []
    maps: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor) -> None:
        weights.append(out)

    def place(module: ShiftWindowMSA, args: tuple[Tensor, tuple[int, int]], out: Tensor) -> None:
        (tokens, (height, width)), size = args, module.window_size
        grid = torch.arange(height * width).view(1, height, width, 1)
        grid = F.pad(grid, (0, 0, 0, -width % size, 0, -height % size), value=-1)
        grid = torch.roll(grid, (-module.shift_size, -module.shift_size), (1, 2))
        cut = module.window_partition(grid).flatten(1)
        padding = int((cut < 0).sum())
        keys = cut + padding
        keys[cut < 0] = torch.arange(padding)
        attention = weights.pop().unflatten(0, (len(tokens), -1))
        heads = attention.shape[2]
        dense = attention.new_zeros(len(tokens), heads, height * width, padding + height * width)
        for number, (window, own) in enumerate(zip(cut, keys, strict=True)):
            for token in (window >= 0).nonzero().flatten():
                dense[:, :, window[token], own] = attention[:, number, :, token]
        maps.append(dense)

    for module in stock.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(keep)
        if isinstance(module, ShiftWindowMSA):
            module.register_forward_hook(place)
    stock(x)
    return maps


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
@pytest.mark.parametrize('size', SIZES)
def test_features_are_those_of_stock_to_the_bit(options: dict, size: tuple[int, int]) -> None:
    stock, own = make_pair(options)
    with torch.no_grad():
        expected, plain = stock(images(*size)), own(images(*size))
        got, _ = own.forward_with_attention(images(*size))
    assert type(got) is type(expected)
    for mine, without, theirs in zip(got, plain, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(without, theirs)
        assert mine.is_contiguous()


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_gradients_are_those_of_stock(options: dict) -> None:
    stock, own = (model.double() for model in make_pair(options))
    scalar(stock(images(45, 67).double())).backward()
    scalar(own.forward_with_attention(images(45, 67).double())[0]).backward()
    expected = parameter_gradients(stock)
    for key, gradient in parameter_gradients(own).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-9, rtol=1e-7, msg=key)


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
@pytest.mark.parametrize('layers', ['last', 'all'])
@pytest.mark.parametrize('size', SIZES)
def test_attention_is_that_of_stock(options: dict, layers: str, size: tuple[int, int]) -> None:
    stock, own = make_pair(options, attention_layers=layers)
    with torch.no_grad():
        expected = stock_attention(stock, images(*size))
        _, attentions = own.forward_with_attention(images(*size))
    if layers == 'last':
        expected = [expected[end] for end in torch.tensor(options['depths']).cumsum(0) - 1]
    assert len(attentions) == len(expected)
    for mine, theirs in zip(attentions, expected, strict=True):
        assert isinstance(mine, WindowAttentionMap)
        torch.testing.assert_close(mine.dense(), theirs, atol=1e-6, rtol=1e-5)


def test_maps_lie_on_the_grids_of_the_features() -> None:
    _, own = make_pair(SMALL)
    features, attentions = own.forward_with_attention(images(75, 101))
    grids = [tuple(feature.shape[2:]) for feature in features]
    assert [attention.query_hw for attention in attentions] == grids
    assert [attention.windows.shift for attention in attentions] == [(2, 2), (0, 0), (0, 0), (2, 2)]
    assert [attention.extra_keys for attention in attentions] == [20 * 28 - 19 * 26, 12 * 16 - 10 * 13,
                                                                 8 * 8 - 5 * 7, 4 * 4 - 3 * 4]


def test_transfer_trains_queries_keys_and_biases_and_knows_a_different_teacher() -> None:
    stock, student = make_pair(SMALL)
    teacher = AttentionSwinTransformer(**SMALL)
    teacher.load_state_dict({key: 1.1 * value for key, value in stock.state_dict().items()
                             if 'index' not in key}, strict=False)
    teacher.eval()
    labels = torch.randint(0, 3, (2, 64, 96), generator=torch.Generator().manual_seed(2))
    new, old = (model.forward_with_attention(images())[1] for model in (student, teacher))
    torch.testing.assert_close(crp_loss(new, new, labels), torch.zeros(()))
    crp_loss(new, old, labels).backward()
    last = student.stages[-1].blocks[-1].attn.w_msa
    query, key, value = last.qkv.weight.grad.chunk(3)
    assert query.abs().sum() > 0
    assert key.abs().sum() > 0
    assert value.abs().sum() == 0
    assert last.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize('random', [dict(drop_path_rate=0.6), dict(drop_rate=0.3, attn_drop_rate=0.3)])
def test_in_training_the_same_is_dropped_as_in_stock(random: dict) -> None:
    stock, own = make_pair(SMALL | random)
    for model in (stock, own):
        model.train()
    torch.manual_seed(5)
    expected = stock(images())
    torch.manual_seed(5)
    got, attentions = own.forward_with_attention(images())
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(attentions[0].dense().sum(-1), torch.ones(attentions[0].shape[:3]))


def test_checkpointing_gives_the_same_gradients() -> None:
    _, plain = make_pair(SMALL)
    _, saving = make_pair(SMALL | dict(with_cp=True))
    for model in (plain, saving):
        model.train()
        features, attentions = model.forward_with_attention(images())
        (scalar(features) + sum(a.dense().square().sum() for a in attentions)).backward()
    expected = parameter_gradients(plain)
    for key, gradient in parameter_gradients(saving).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5, msg=key)


def test_the_position_embedding_is_added_where_there_is_one() -> None:
    stock, own = make_pair(SMALL | dict(use_abs_pos_embed=True, pretrain_img_size=64))
    with torch.no_grad():
        got, _ = own.forward_with_attention(images(64, 64))
        for mine, theirs in zip(got, stock(images(64, 64)), strict=True):
            assert torch.equal(mine, theirs)


def test_built_from_the_registry_with_pretrained_weights(tmp_path) -> None:
    init_default_scope('mmseg')
    stock, _ = make_pair(SMALL)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    own = MODELS.build(dict(type='AttentionSwinTransformer', init_cfg=init_cfg, **SMALL))
    own.init_weights()
    for key, tensor in own.state_dict().items():
        torch.testing.assert_close(tensor, stock.state_dict()[key], msg=key)


def test_unknown_attention_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'lst' is unknown \(did you mean 'last'\?\)"):
        AttentionSwinTransformer(attention_layers='lst')
