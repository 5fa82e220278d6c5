# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Mix Transformer with attention is the stock one, and its attention is the stock one's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmseg.models.backbones import MixVisionTransformer
from mmseg.models.backbones.mit import MixFFN, TransformerEncoderLayer
from mmseg.models.utils import nchw_to_nlc, nlc_to_nchw
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.models.backbones.attention_mit import AttentionMixVisionTransformer, mix_ffn
from mmseg_sats.models.backbones.gelu_linear import gelu_linear
from mmseg_sats.models.backbones.self_attention import reduce_tokens
from tests.shared import shared_path

SMALL: dict[str, Any] = {
    'embed_dims': 8,
    'num_layers': [2, 1, 1, 2],
    'num_heads': [1, 2, 3, 4],
    'sr_ratios': [4, 2, 2, 1],
}
MIT_B0: dict[str, Any] = {'embed_dims': 32, 'num_layers': [2, 2, 2, 2], 'num_heads': [1, 2, 5, 8]}


def make_pair(
    **config: Any,
) -> tuple[MixVisionTransformer, AttentionMixVisionTransformer]:
    """Stock and own backbone with the same random parameters, in eval mode."""
    torch.manual_seed(0)
    stock = MixVisionTransformer(
        **{name: value for name, value in config.items() if name != 'attention_layers'}
    )
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    own = AttentionMixVisionTransformer(**config)
    own.load_state_dict(stock.state_dict(), strict=True)
    return stock.eval(), own.eval()


def images(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def parameter_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def scalar(features: list[Tensor]) -> Tensor:
    return sum((feature * feature.detach().cos()).mean() for feature in features)


def value_and_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of one scalar of it for the inputs."""
    return [out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)]


def stock_attention(stock: MixVisionTransformer, x: Tensor) -> list[Tensor]:
    """The attention weights of each layer, asked of each nn.MultiheadAttention with its own
    inputs."""
    weights: list[Tensor] = []

    def ask(module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Tensor]) -> None:
        module_inputs = (kwargs['query'], kwargs['key'], kwargs['value'])
        # forward, not the module itself: the hook must not call itself.
        result = module.forward(*module_inputs, need_weights=True, average_attn_weights=False)
        weights.append(result[1])

    hooks = [
        module.register_forward_pre_hook(ask, with_kwargs=True)
        for module in stock.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    stock(x)
    for hook in hooks:
        hook.remove()
    return weights


@pytest.mark.parametrize('config', [SMALL, MIT_B0], ids=['small', 'mit_b0'])
@pytest.mark.parametrize('size', [(64, 64), (75, 101)])
def test_features_are_those_of_stock(config: dict[str, Any], size: tuple[int, int]) -> None:
    stock, own = make_pair(**config)
    with torch.no_grad():
        expected, got = stock(images(*size)), own(images(*size))
        with_attention, _ = own.forward_with_attention(images(*size))
    assert type(got) is type(expected)
    for mine, again, theirs in zip(got, with_attention, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again, mine)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_gradients_are_those_of_stock(qkv_bias: bool) -> None:
    stock, own = (model.double() for model in make_pair(**SMALL, qkv_bias=qkv_bias))
    for model in (stock, own):
        scalar(model(images(45, 67).double())).backward()
    expected = parameter_gradients(stock)
    assert any('in_proj_bias' in name for name in expected) == qkv_bias
    for name, gradient in parameter_gradients(own).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.parametrize('config', [SMALL, MIT_B0], ids=['small', 'mit_b0'])
@pytest.mark.parametrize('layers', ['last', 'all'])
def test_attention_is_that_of_stock(config: dict[str, Any], layers: str) -> None:
    stock, own = make_pair(**config, attention_layers=layers)
    with torch.no_grad():
        expected = stock_attention(stock, images(75, 101))
        _, attentions = own.forward_with_attention(images(75, 101))
    ends = torch.tensor(config['num_layers']).cumsum(0) - 1
    if layers == 'last':
        expected = [expected[end] for end in ends]
    assert len(attentions) == len(expected)
    for mine, theirs in zip(attentions, expected, strict=True):
        assert isinstance(mine, AttentionMap)
        torch.testing.assert_close(mine.dense(), theirs, atol=1e-5, rtol=1e-4)


def test_arguments_by_place_are_those_of_stock() -> None:
    model = AttentionMixVisionTransformer(4, 16, attention_layers='all')
    assert model.layers[0][0].projection.weight.shape[:2] == (16, 4)


def test_grids_and_heads_of_each_stage() -> None:
    _, own = make_pair(**SMALL)
    features, attentions = own.forward_with_attention(images(64, 96))
    assert [attention.num_heads for attention in attentions] == SMALL['num_heads']
    assert [attention.key_hw for attention in attentions] == [(4, 6), (4, 6), (2, 3), (2, 3)]
    for feature, attention in zip(features, attentions, strict=True):
        assert attention.query_hw == tuple(feature.shape[2:])
        assert attention.scale == pytest.approx(8**-0.5)


def test_all_stages_have_attention_whatever_out_indices() -> None:
    _, own = make_pair(**SMALL, out_indices=(1, 3))
    features, attentions = own.forward_with_attention(images())
    assert [feature.shape[1] for feature in features] == [16, 32]
    assert [attention.num_heads for attention in attentions] == SMALL['num_heads']


def test_attention_trains_queries_and_keys() -> None:
    _, own = make_pair(**SMALL)
    _, attentions = own.forward_with_attention(images())
    labels = torch.ones(2, *attentions[-1].query_hw, dtype=torch.long)
    attentions[-1].pool(labels)[0].square().sum().backward()
    gradient = own.layers[3][1][1].attn.attn.in_proj_weight.grad
    query, key, value = gradient.chunk(3)
    assert query.abs().sum() > 0
    assert key.abs().sum() > 0
    assert value.abs().sum() == 0


def test_checkpointing_gives_the_same_gradients() -> None:
    _, plain = make_pair(**SMALL)
    _, saving = make_pair(**SMALL, with_cp=True)
    for model in (plain, saving):
        model.train()
        features, attentions = model.forward_with_attention(images())
        dense = sum(attention.dense().square().sum() for attention in attentions)
        (scalar(features) + dense).backward()
    expected = parameter_gradients(plain)
    for name, gradient in parameter_gradients(saving).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_runs_a_layer_again_in_backward() -> None:
    _, saving = make_pair(**SMALL, with_cp=True)
    calls = []
    saving.layers[0][1][1].norm1.register_forward_hook(lambda *_: calls.append(1))
    scalar(saving(images())).backward()
    assert len(calls) == 2
    with torch.no_grad():
        saving(images())
    assert len(calls) == 3


def test_all_dropouts_are_at_work_in_training_only() -> None:
    for name in ('drop_rate', 'attn_drop_rate', 'drop_path_rate'):
        _, own = make_pair(**SMALL, **{name: 0.5})
        quiet = own(images())[-1]
        torch.testing.assert_close(own(images())[-1], quiet)
        own.train()
        assert not torch.allclose(own(images())[-1], own(images())[-1]), name
        scalar(own(images())).backward()
        gradients = [g for g in parameter_gradients(own).values() if g is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_stochastic_depth_drops_the_same_branches_as_stock() -> None:
    stock, own = (model.train() for model in make_pair(**SMALL, drop_path_rate=0.6))
    torch.manual_seed(5)
    expected = stock(images())
    torch.manual_seed(5)
    for mine, theirs in zip(own(images()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_attention_is_taken_before_attention_dropout() -> None:
    _, own = make_pair(**SMALL, attn_drop_rate=0.5)
    first = own.train().forward_with_attention(images())[1][0]
    torch.testing.assert_close(first.dense().sum(-1), torch.ones(first.shape[:3]))


def test_bfloat16_autocast() -> None:
    _, own = make_pair(**SMALL)
    with torch.autocast('cpu', torch.bfloat16):
        features, attentions = own.forward_with_attention(images())
        dense = attentions[0].dense()
        loss = scalar(features) + dense.square().sum()
    assert dense.dtype == torch.float32
    loss.backward()
    assert all(g.isfinite().all() for g in parameter_gradients(own).values() if g is not None)


@pytest.mark.parametrize('hw', [(8, 12), (9, 7), (4, 4)])
@pytest.mark.parametrize('bias', [True, False])
def test_spatial_reduction_as_a_product_is_the_convolution(hw: tuple[int, int], bias: bool) -> None:
    """Value and gradient, also where rows and columns are left over."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, kernel_size=4, stride=4, bias=bias).double()
    x = torch.randn(2, hw[0] * hw[1], 6, dtype=torch.float64, requires_grad=True)
    convolved = conv(nlc_to_nchw(x, hw))
    out, key_hw = reduce_tokens(conv, x, hw)
    assert key_hw == tuple(convolved.shape[2:])
    expected = value_and_gradients(nchw_to_nlc(convolved), x, *conv.parameters())
    for mine, theirs in zip(value_and_gradients(out, x, *conv.parameters()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_a_grid_smaller_than_the_reduction_is_refused() -> None:
    _, own = make_pair(**SMALL)
    with pytest.raises(ValueError, match='reduction by 4 needs a grid of 4 x 4 tokens at least, got 8 x 3'):
        own(images(32, 12))


def dropout_follows_memory() -> bool:
    """Whether dropout draws the numbers of a channels-last tensor in the order of its memory; torch 2.4 does not."""
    drawn = []
    for ones in (torch.ones(2, 5, 7, 6).double(), torch.ones(2, 5, 7, 6).double().permute(0, 3, 1, 2)):
        torch.manual_seed(0)
        drawn.append(torch.dropout(ones, 0.5, train=True))
    return torch.equal(drawn[0].permute(0, 3, 1, 2), drawn[1])


@pytest.mark.parametrize('drops', [
    {},
    {'ffn_drop': 0.3},
    {'dropout_layer': {'type': 'DropPath', 'drop_prob': 0.5}},
    {'act_cfg': {'type': 'GELU', 'approximate': 'tanh'}},
    {'act_cfg': {'type': 'ReLU'}},
])
def test_the_feed_forward_layer_on_tokens_is_the_stock_one(drops: dict[str, Any]) -> None:
    """Value and gradient, and the same draws of dropout."""
    if 'ffn_drop' in drops and not dropout_follows_memory():
        pytest.skip('this torch draws in another order for the stock layer, whose maps are channels-last')
    torch.manual_seed(0)
    module = MixFFN(6, 24, **drops).double().train()
    x, identity = (torch.randn(4, 35, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, identity, *module.parameters())
    torch.manual_seed(3)
    expected = value_and_gradients(module(x, (5, 7), identity=identity), *inputs)
    torch.manual_seed(3)
    got = value_and_gradients(mix_ffn(module, x, (5, 7), identity=identity), *inputs)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize('still', [(), (0,), (1, 2)])
def test_a_linear_layer_of_gelu_has_the_value_and_gradients_of_both(still: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in [(2, 3, 5), (4, 5), (4,)]]
    moving = [tensor.requires_grad_() for index, tensor in enumerate(arguments) if index not in still]
    x, weight, bias = arguments
    by_formula = x * (1 + torch.erf(x / 2**0.5)) / 2 @ weight.T + bias
    for expected in (by_formula, F.linear(F.gelu(x), weight, bias)):
        pairs = zip(
            value_and_gradients(gelu_linear(*arguments), *moving), value_and_gradients(expected, *moving), strict=True
        )
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_a_linear_layer_of_gelu_keeps_no_more_than_its_arguments() -> None:
    arguments = [torch.randn(shape, requires_grad=True) for shape in [(2, 30, 5), (4, 5), (4,)]]
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gelu_linear(*arguments)
    assert set(kept) == {tensor.data_ptr() for tensor in arguments[:2]}


def test_under_autocast_a_linear_layer_of_gelu_rounds_as_both_do() -> None:
    torch.manual_seed(0)
    arguments = [torch.randn(shape, requires_grad=True) for shape in [(2, 30, 5), (4, 5), (4,)]]
    x, weight, bias = arguments
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mine, theirs = gelu_linear(*arguments), F.linear(F.gelu(x), weight, bias)
    assert mine.dtype == torch.bfloat16
    pairs = zip(value_and_gradients(mine, *arguments), value_and_gradients(theirs, *arguments), strict=True)
    for own, stock in pairs:
        assert own.dtype == stock.dtype
        torch.testing.assert_close(own, stock, atol=1e-2, rtol=1e-2)


def test_a_traced_layer_of_gelu_has_torchs_operators_only() -> None:
    arguments = [torch.randn(shape, requires_grad=True) for shape in [(2, 30, 5), (4, 5), (4,)]]
    kinds = {node.kind() for node in torch.jit.trace(gelu_linear, arguments).graph.nodes()}
    assert 'aten::gelu' in kinds
    assert all(kind.startswith(('aten::', 'prim::Constant')) for kind in kinds)


def test_the_layout_of_the_images_does_not_matter() -> None:
    _, own = make_pair(**SMALL)
    with torch.no_grad():
        expected = own(images())
        got = own(images().contiguous(memory_format=torch.channels_last))
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous(memory_format=torch.channels_last)


def test_submodules_are_stock() -> None:
    _, own = make_pair(**SMALL)
    blocks = [block for stage in own.layers for block in stage[1]]
    assert {type(block) for block in blocks} == {TransformerEncoderLayer}


def test_built_from_the_registry_with_pretrained_weights(tmp_path) -> None:
    stock, _ = make_pair(**SMALL)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'mit.pth')
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'mit.pth')}
    own = MODELS.build({'type': 'AttentionMixVisionTransformer', 'init_cfg': init_cfg, **SMALL})
    own.init_weights()
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(tensor, stock.state_dict()[name], msg=name)


def test_shared_weights_load_strictly() -> None:
    state = torch.load(shared_path('weights/mit_b0.pth'), weights_only=True)['state_dict']
    stock, own = MixVisionTransformer(**MIT_B0), AttentionMixVisionTransformer(**MIT_B0)
    for model in (stock, own):
        model.load_state_dict(state, strict=True)
        model.eval()
    with torch.no_grad():
        for mine, theirs in zip(own(images()), stock(images()), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_unknown_attention_layers_and_typos_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'lst' is unknown \(did you mean 'last'\?\)"):
        AttentionMixVisionTransformer(attention_layers='lst')
    with pytest.raises(TypeError, match='embed_dim'):
        AttentionMixVisionTransformer(embed_dim=32)
