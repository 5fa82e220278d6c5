# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which of mmseg's heads grow with the classes, what growing leaves as it was, and how the others are refused."""

from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.models.heads.class_tensors import class_tensors
from mmseg_sats.models.heads.classifier import add_background, grow_head
from tests.small_models import auxiliary_head_cfg, build, model_cfg

NUM_OLD, NUM_ALL = 4, 6
WIDTHS = (8, 8, 16, 32)
LAST = dict(in_channels=32, in_index=3)
ALL = dict(in_channels=WIDTHS, in_index=(0, 1, 2, 3))
VIT = dict(in_channels=(32,) * 4, in_index=(0, 1, 2, 3))  # four maps of a plain ViT

# mmseg's heads whose output for the old classes does not change where a class is added, with their arguments.
GROW: dict[str, dict[str, Any]] = {
    'ANNHead': dict(in_channels=(16, 32), in_index=(2, 3), project_channels=4, dropout_ratio=0.1),
    'APCHead': dict(LAST, pool_scales=(1, 2)),
    'ASPPHead': dict(LAST, dilations=(1, 2)),
    'DAHead': dict(LAST, pam_channels=4),
    'DDRHead': dict(in_channels=32),
    'DMHead': dict(LAST, filter_sizes=(1, 3)),
    'DNLHead': LAST,
    'DPTHead': dict(
        VIT, input_transform='multiple_select', channels=16, embed_dims=32, post_process_channels=(4, 4, 8, 8)
    ),
    'DepthwiseSeparableASPPHead': dict(LAST, c1_in_channels=8, c1_channels=4, dilations=(1, 2)),
    'DepthwiseSeparableFCNHead': LAST,
    'EMAHead': dict(LAST, ema_channels=8, num_bases=4, num_stages=2),
    'EncHead': dict(in_channels=(32,), in_index=(3,)),
    'FCNHead': LAST,
    'FPNHead': dict(in_channels=(8,) * 4, in_index=(0, 1, 1, 1), feature_strides=(4, 8, 8, 8)),
    'GCHead': LAST,
    'ISAHead': dict(LAST, isa_channels=4, down_factor=(2, 2)),
    'LeanSegformerHead': ALL,
    'LRASPPHead': dict(
        in_channels=(8, 16, 32), in_index=(0, 2, 3), branch_channels=(4, 8), input_transform='multiple_select'
    ),
    'LightHamHead': dict(
        in_channels=(8, 16, 32), in_index=(1, 2, 3), ham_channels=8, ham_kwargs=dict(MD_R=4),
        norm_cfg=dict(type='GN', num_groups=2),
    ),
    'NLHead': LAST,
    'PSPHead': dict(LAST, pool_scales=(1, 2)),
    'SETRMLAHead': dict(VIT, channels=16, mla_channels=4),
    'SETRUPHead': LAST,
    'SegformerHead': ALL,
    'UPerHead': dict(ALL, pool_scales=(1, 2)),
}  # fmt: skip
# Grows too, but its class tokens attend to one another and one norm is over all classes.
SEGMENTER = dict(LAST, norm_cfg=dict(type='LN'), num_layers=1, num_heads=2, embed_dims=8)


@pytest.fixture(autouse=True)
def mmseg_scope() -> None:
    init_default_scope('mmseg')


def head_cfg(kind: str | type, num_classes: int, **options: Any) -> dict[str, Any]:
    if kind == 'CascadeHead':
        heads = [head_cfg('FCNHead', 2), head_cfg('OCRHead', 2, ocr_channels=4)]
        return dict(type=kind, heads=heads, num_classes=num_classes)
    own = SEGMENTER if kind == 'SegmenterMaskTransformerHead' else GROW.get(kind, LAST)
    common = dict(type=kind, channels=8, norm_cfg=dict(type='BN'), num_classes=num_classes, dropout_ratio=0.0)
    return common | own | options


def make_head(cfg: dict[str, Any], seed: int) -> nn.Module:
    """A head in eval mode with random weights large enough for its outputs to differ from pixel to pixel."""
    torch.manual_seed(seed)
    head = MODELS.build(dict(cfg)).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def outputs(head: nn.Module) -> list[Tensor]:
    """What the head returns in training for random feature maps, its norms in eval mode."""
    maps = [(width, 16 >> level) for level, width in enumerate(WIDTHS)]
    kind = type(head).__name__
    if kind in ('DPTHead', 'SETRMLAHead'):
        maps = [(32, 4)] * 4
    if kind == 'LRASPPHead':  # averages over windows of 49
        maps = [(width, 64) for width, _ in maps]
    if kind == 'DDRHead':
        head.training, maps = True, [(16, 4), (32, 4)]
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(2, width, side, side, generator=generator) for width, side in maps]
    if kind == 'DPTHead':
        features = [(one, torch.randn(2, 32, generator=generator)) for one in features]
    torch.manual_seed(5)  # LightHamHead draws its bases
    with torch.no_grad():
        result = head(features)
    head.training = False
    return list(result) if isinstance(result, tuple) else [result]


def grow(kind: str, init: str) -> tuple[nn.Module, nn.Module, dict[str, int]]:
    """An old head, one with two more classes that has loaded its weights, and the tensors with a row a class."""
    old, new = make_head(head_cfg(kind, NUM_OLD), 0), make_head(cfg := head_cfg(kind, NUM_ALL), 1)
    tensors = class_tensors('decode_head', new, cfg)
    state_dict = {f'decode_head.{key}': value.clone() for key, value in old.state_dict().items()}
    grow_head(state_dict, 'decode_head.', new, tensors, NUM_OLD, init)
    new.load_state_dict({key.removeprefix('decode_head.'): value for key, value in state_dict.items()})
    return old, new, tensors


@pytest.mark.parametrize('kind', GROW)
def test_the_old_classes_logits_are_as_before(kind: str) -> None:
    old, new, _ = grow(kind, 'random')
    before, after = outputs(old), outputs(new)
    assert len(before) == len(after) == {'DAHead': 3, 'EncHead': 2, 'DDRHead': 2}.get(kind, 1)
    for one, other in zip(before, after, strict=True):
        assert (one.shape[1], other.shape[1]) == (NUM_OLD, NUM_ALL)
        torch.testing.assert_close(other[:, :NUM_OLD], one, atol=1e-5, rtol=1e-5)
        assert not torch.equal(other[:, -1], other[:, -2])


@pytest.mark.parametrize('kind', GROW)
def test_a_balanced_head_says_background_or_new_where_the_old_one_said_background(kind: str) -> None:
    old, new, _ = grow(kind, 'balanced')
    for one, other in zip(outputs(old), outputs(new), strict=True):
        if one.dim() == 2:  # EncHead: which classes an image shows, each by a sigmoid of its own
            assert torch.equal(other, torch.cat([one, one[:, :1], one[:, :1]], 1))
            continue
        before, after = one.log_softmax(1), other.log_softmax(1)
        shared = torch.cat([after[:, :1], after[:, NUM_OLD:]], 1)
        torch.testing.assert_close(shared.logsumexp(1), before[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after[:, 1:NUM_OLD], before[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('init', ['balanced', 'keep_background', 'random'])
def test_class_tokens_grow_by_rows(init: str) -> None:
    old, new, tensors = grow('SegmenterMaskTransformerHead', init)
    assert tensors == {'cls_emb': 1, 'mask_norm.weight': 0, 'mask_norm.bias': 0}
    fresh = make_head(head_cfg('SegmenterMaskTransformerHead', NUM_ALL), 1).state_dict()
    before, after = old.state_dict(), new.state_dict()
    for key, dim in tensors.items():
        assert torch.equal(after[key].narrow(dim, 0, NUM_OLD), before[key])
        rows = before[key].narrow(dim, 0, 1) if init != 'random' else fresh[key].narrow(dim, NUM_OLD, 2)
        new_rows = after[key].narrow(dim, NUM_OLD, 2)
        assert torch.equal(new_rows, rows.expand_as(new_rows))
    assert all(torch.equal(after[key], before[key]) for key in before if key not in tensors)
    (one,), (other,) = outputs(old), outputs(new)
    # The values move, for all classes see one another; which old class is the likeliest stays.
    assert not torch.allclose(other[:, :NUM_OLD], one, atol=1e-3)
    assert torch.equal(other[:, :NUM_OLD].argmax(1), one.argmax(1))
    if init != 'random':  # the new tokens are the background's, so they see what it sees
        assert torch.allclose(other[:, NUM_OLD:], other[:, :1], atol=1e-5)


def test_regions_of_all_classes_describe_a_pixel_in_a_cascade() -> None:
    old, new, tensors = grow('CascadeHead', 'random')
    assert tensors == dict.fromkeys([f'{i}.conv_seg.{kind}' for i in (0, 1) for kind in ('weight', 'bias')], 0)
    (last, first), (grown_last, grown_first) = outputs(old), outputs(new)
    assert torch.allclose(grown_first[:, :NUM_OLD], first, atol=1e-5)
    assert not torch.allclose(grown_last[:, :NUM_OLD], last, atol=1e-3)
    same = grown_last[:, :NUM_OLD].argmax(1) == last.argmax(1)
    assert same.float().mean() > 0.9


@pytest.mark.parametrize('kind', ['DAHead', 'EncHead', 'DDRHead', 'SegmenterMaskTransformerHead'])
def test_a_head_without_background_gets_one_in_every_tensor(kind: str) -> None:
    old = make_head(head_cfg(kind, NUM_OLD), 0)
    new = make_head(cfg := head_cfg(kind, NUM_OLD + 1), 1)
    state_dict = {f'decode_head.{key}': value for key, value in old.state_dict().items()}
    tensors = class_tensors('decode_head', new, cfg)
    add_background(state_dict, 'decode_head.', tensors)
    new.load_state_dict({key.removeprefix('decode_head.'): value for key, value in state_dict.items()})
    for key, dim in tensors.items():
        rows = new.state_dict()[key]
        assert torch.equal(rows.narrow(dim, 1, NUM_OLD), old.state_dict()[key])
    if kind != 'SegmenterMaskTransformerHead':
        for one, other in zip(outputs(old), outputs(new), strict=True):
            torch.testing.assert_close(other[:, 1:], one, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other[:, 0], one.mean(1), atol=1e-4, rtol=1e-4)


class WideInput(FCNHead):
    """The layer before its classifier sees a map of each class, as in PointRend's head."""

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        self.mix = nn.Conv2d(8 + num_classes, 8, 1)


class NoClassifier(FCNHead):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv_seg = nn.Conv2d(8, 5, 1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    'two classes in one channel': (head_cfg('FCNHead', 2, out_channels=1), 'has 1 output channel for 2 classes'),
    'OCR': (head_cfg('OCRHead', 4, ocr_channels=4), 'needs the output of another head'),
    'edges': (head_cfg('PIDHead', 4) | dict(in_channels=32, in_index=-1), 'its loss needs maps of edges'),
    'kernels': (dict(type='IterativeDecodeHead', num_classes=4), 'does not classify each pixel'),
    'masks': (dict(type='Mask2FormerHead', num_classes=4), 'does not classify each pixel'),
    'points': (dict(type='PointHead', num_classes=4), 'its layers take a map of each class'),
    'boundaries': (head_cfg('STDCHead', 2, num_convs=1), r'boundaries .*auxiliary_head=None'),
    'columns': (head_cfg(WideInput, 8), r'in mix\.weight \(8, 16, 1, 1\), its shape depends on the number of classes'),
    'nothing': (head_cfg(NoClassifier, 4), 'none of its tensors has a row for each of its 4 classes'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_heads_that_cannot_grow_are_refused_when_the_model_is_built(case: str) -> None:
    cfg, message = REFUSED[case]
    name = cfg['type'] if isinstance(cfg['type'], str) else cfg['type'].__name__
    model = model_cfg(cfg['num_classes'], auxiliary_head=[auxiliary_head_cfg(cfg['num_classes']), cfg])
    with pytest.raises(TypeError, match=rf'auxiliary_head\.1 \({name}\) cannot grow: .*{message}'):
        build(model)


def test_the_head_of_a_cascade_that_cannot_grow_is_named() -> None:
    cfg = head_cfg('CascadeHead', 4)
    cfg['heads'][1] = dict(type='PointHead', num_classes=4)
    with pytest.raises(TypeError, match=r'decode_head\.1 \(PointHead\) cannot grow'):
        build(model_cfg(4, decode_head=cfg))


def test_looking_for_what_grows_leaves_the_random_numbers_alone() -> None:
    cfg = head_cfg('FCNHead', 8, out_channels=8)  # channels and classes alike: found by building, not by the number
    head = MODELS.build(cfg)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert class_tensors('decode_head', head, cfg) == {'conv_seg.weight': 0, 'conv_seg.bias': 0}
    assert torch.equal(torch.rand(3), expected)
    assert cfg == head_cfg('FCNHead', 8, out_channels=8)


def test_an_unknown_class_needs_a_head_with_one_classifier() -> None:
    cfg = model_cfg(4, decode_head=head_cfg('DAHead', 4, pam_channels=4), unknown=True)
    with pytest.raises(TypeError, match=r'unknown=True: decode_head \(DAHead\) .* found pam_conv_seg\.weight'):
        build(cfg)
