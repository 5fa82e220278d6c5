# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Whole runs of two stages with each recipe's own model, made thin; stock mmseg loads what they leave."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from yapf.yapflib import yapf_api

from tests.conftest import CONFIGS
from tests.runs import weights

MakeConfig = Callable[..., Config]
UPERNET = dict(decode_head=dict(channels=8), auxiliary_head=dict(channels=8))
RESNET = dict(
    backbone=dict(depth=18, base_channels=4, stem_channels=4, init_cfg=None),
    decode_head=dict(in_channels=32, channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
)


def pyramid(widths: list[int], **backbone: Any) -> dict[str, Any]:
    """A thin backbone of four stages, UPerNet behind it."""
    heads = copy.deepcopy(UPERNET)
    heads['decode_head']['in_channels'] = widths
    heads['auxiliary_head']['in_channels'] = widths[2]
    return dict(backbone=backbone, **heads)


SWIN = pyramid([8, 16, 32, 64], embed_dims=8, num_heads=[1, 2, 2, 4], depths=[1, 1, 2, 1])

# Recipe, what makes it thin, what SATS hands on, stock mmseg's name of the backbone.
THIN: dict[str, tuple[str, dict[str, Any], str, str]] = {
    'vit': (
        'vit_b_upernet_voc',
        dict(
            backbone=dict(img_size=(64, 64), embed_dims=16, num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3)),
            neck=dict(in_channels=[16] * 4, out_channels=8),
            decode_head=dict(in_channels=[8] * 4, channels=8),
            auxiliary_head=dict(in_channels=8, channels=8),
        ),
        'attention',
        'VisionTransformer',
    ),
    'pcpvt': (
        'twins_pcpvt_s_upernet_voc',
        pyramid([8, 8, 16, 16], embed_dims=[8, 8, 16, 16], num_heads=[1, 2, 2, 4], depths=[1, 1, 1, 1]),
        'attention',
        'PCPVT',
    ),
    'svt': (
        'twins_svt_s_upernet_voc',
        pyramid([8, 8, 16, 16], embed_dims=[8, 8, 16, 16], num_heads=[1, 2, 2, 4], depths=[2, 2, 2, 2]),
        'attention',
        'SVT',
    ),
    'swin': (
        'swin_t_upernet_voc',
        SWIN,
        'attention',
        'SwinTransformer',
    ),
    'swin_features': ('swin_t_upernet_voc', SWIN, 'feature', 'SwinTransformer'),
    'deeplabv3': ('deeplabv3_r101_voc', RESNET, 'feature', 'ResNetV1c'),
    'fcn': ('r50_fcn_voc', RESNET, 'feature', 'ResNetV1c'),
}


@pytest.fixture(autouse=True)
def unformatted_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying out the text of the configs takes most of the time of a small run."""
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **_: (text, True))


@pytest.fixture(params=list(THIN))
def run(request: pytest.FixtureRequest, shapes_cfg: MakeConfig) -> tuple[str, Config]:
    """A config of two stages, 3-3, and the name of stock mmseg's backbone."""
    recipe, thin, source, backbone = THIN[request.param]
    model = Config.fromfile(CONFIGS / '_base_' / f'{recipe}.py')
    model.merge_from_dict(
        dict(model=thin, norm_cfg=dict(type='BN'), pretrained=None, crop_size=64),
    )
    cfg = shapes_cfg('sats', protocol='3-3', train_images=8, val_images=4, batch_size=4)
    cfg.distillation.attention.source = source
    for key in ('model', 'norm_cfg', 'pretrained', 'auxiliary_loss', 'optim_wrapper', 'head_lr_mult'):
        if key in model:
            cfg[key] = model[key]
    return backbone, cfg


def test_two_stages_and_a_snapshot_for_everybody(run: tuple[str, Config]) -> None:
    backbone, cfg = run
    results = RUNNERS.build(cfg).train()
    assert [len(stage['new_classes']) for stage in results['stages']] == [3, 3]
    folder = Path(cfg.work_dir) / 'stage_1'
    losses = logged_losses(folder)
    assert losses['loss_attention'] > 0
    assert losses['aux.loss_ce'] > 0
    old, new = (weights(Path(cfg.work_dir) / f'stage_{index}' / 'snapshot.pth') for index in (0, 1))
    for head in ('decode_head', 'auxiliary_head'):
        assert [w[f'{head}.conv_seg.weight'].shape[0] for w in (old, new)] == [4, 7]
    own = MODELS.build(Config.fromfile(folder / 'config.py').model)
    stock_cfg = Config.fromfile(folder / 'config.py').model
    for key in ('old_model', 'pseudo_labeler', 'distillation', 'classifier_init'):
        stock_cfg.pop(key)
    stock_cfg.type, stock_cfg.backbone.type = 'EncoderDecoder', backbone
    stock = MODELS.build(stock_cfg)
    assert type(stock) is EncoderDecoder
    for model in (own, stock):
        model.load_state_dict(new, strict=True)
        model.eval()
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model(images, mode='tensor') for model in (own, stock))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def logged_losses(folder: Path) -> dict[str, float]:
    """The last training record of a stage."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if 'loss' in record][-1]
