# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Runs of two stages with heads of which more than one tensor, output or loss depends on the classes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmseg.apis import init_model
from mmseg.models import EncoderDecoder

from mmseg_sats.api.old_model import read_old_model
from mmseg_sats.engine.config.trained_model import take_trained_model
from mmseg_sats.engine.export.stock import export_stage
from mmseg_sats.engine.files.base import adopt_base
from mmseg_sats.engine.files.snapshot import write_weights
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.small_models import CROSS_ENTROPY, MIT, MIT_CHANNELS, build, images, samples

MakeConfig = Callable[..., Config]
COMMON = dict(channels=8, norm_cfg=dict(type='BN'), num_classes='$num_channels', loss_decode='$segmentation_loss')
# On the MiT of the embedded data's config, whose last two maps have 64 and 128 channels.
DANET = dict(COMMON, type='DAHead', in_channels=64, in_index=2, pam_channels=4)
ENCNET = dict(COMMON, type='EncHead', in_channels=[128], in_index=[3])
SEGMENTER = dict(
    COMMON, type='SegmenterMaskTransformerHead', in_channels=64, in_index=2, norm_cfg=dict(type='LN'), num_layers=1,
    num_heads=2, embed_dims=8,
)  # fmt: skip
DDRNET = dict(type='DDRNet', in_channels=3, channels=4, ppm_channels=8, norm_cfg=dict(type='BN'))
DDR = dict(COMMON, type='DDRHead', in_channels=16)

OCRNET = dict(
    type='CascadeHead', num_classes='$num_channels', loss_decode='$segmentation_loss',
    heads=[
        dict(COMMON, type='FCNHead', in_channels=64, in_index=2, loss_decode=dict(CROSS_ENTROPY, loss_weight=0.4)),
        dict(COMMON, type='OCRHead', in_channels=64, in_index=2, ocr_channels=4),
    ],
)  # fmt: skip

# The model, some tensors that grow with the dimension of the classes, the losses of the heads.
RUNS: dict[str, tuple[dict[str, Any], dict[str, int], list[str]]] = {
    'EncHead beside DAHead and class tokens': (
        dict(decode_head=ENCNET, auxiliary_head=[DANET, SEGMENTER]),
        {
            'decode_head.se_layer.weight': 0,
            'auxiliary_head.0.pam_conv_seg.bias': 0,
            'auxiliary_head.1.cls_emb': 1,
            'auxiliary_head.1.mask_norm.bias': 0,
        },
        ['decode.loss_ce', 'decode.loss_se', 'aux_0.pam_cam.loss_ce', 'aux_0.cam.loss_ce', 'aux_1.loss_ce'],
    ),
    'DDRHead': (
        dict(backbone=DDRNET, decode_head=DDR),
        {'decode_head.conv_seg.bias': 0, 'decode_head.aux_cls_seg.weight': 0},
        ['decode.context.loss_ce', 'decode.spatial.loss_ce'],
    ),
    'CascadeHead': (
        dict(decode_head=OCRNET),
        {'decode_head.0.conv_seg.bias': 0, 'decode_head.1.conv_seg.weight': 0},
        ['decode.0.loss_ce', 'decode.1.loss_ce'],
    ),
}


def config(shapes_cfg: MakeConfig, model: dict[str, Any], **options: Any) -> Config:
    cfg = shapes_cfg('sats', train_images=12, val_images=4, batch_size=6, **options)
    for part, own in model.items():
        cfg.model[part] = copy.deepcopy(own)
    if 'backbone' in model:  # DDRNet has one map outside of training
        cfg.distillation.attention.update(source='feature', blocks=(0,))
    return cfg


@pytest.mark.parametrize('name', RUNS)
def test_two_stages_are_trained_and_exported(name: str, shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    model, tensors, losses = RUNS[name]
    cfg = config(shapes_cfg, model, protocol='3-3')
    RUNNERS.build(cfg).train()
    stage = Path(cfg.work_dir) / 'stage_1'
    weights = load_checkpoint_safely(stage / 'snapshot.pth')['state_dict']
    assert {key: weights[key].shape[dim] for key, dim in tensors.items()} == dict.fromkeys(tensors, 7)
    scalars = next(stage.rglob('scalars.json')).read_text()
    assert [loss for loss in losses if f'"{loss}"' not in scalars] == []
    export_stage(stage, tmp_path / 'export')


def test_a_head_of_one_channel_for_two_classes_learns_more(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    head = dict(
        type='FCNHead', in_channels=64, in_index=2, channels=8, num_convs=1, num_classes=2, out_channels=1,
        threshold=0.35, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )  # fmt: skip
    cfg = config(shapes_cfg, dict(decode_head=head, auxiliary_head=dict(head)), protocol='1-5')
    cfg.model.decode_head.loss_decode = '$segmentation_loss'
    backbone = dict(cfg.model.backbone, type='MixVisionTransformer', init_cfg=None)
    torch.manual_seed(1)
    stock = EncoderDecoder(backbone, dict(head), auxiliary_head=dict(head), test_cfg=ConfigDict(mode='whole')).eval()
    for key in ('decode_head', 'auxiliary_head'):
        torch.nn.init.normal_(stock.get_submodule(key).conv_seg.weight, std=5)
    meta = dict(dataset_meta=dict(classes=['background', 'plain disc']))
    write_weights(tmp_path / 'old.pth', stock.state_dict(), meta)
    cfg.base = str(tmp_path / 'old.pth')
    RUNNERS.build(cfg).train()
    taken = init_model(str(tmp_path / 'run/stage_0/config.py'), str(tmp_path / 'run/stage_0/snapshot.pth'), 'cpu')
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = stock.predict(images)
        after = taken.predict(images)
    for one, other in zip(before, after, strict=True):
        assert 0 < one.pred_sem_seg.data.float().mean() < 1
        assert torch.equal(one.pred_sem_seg.data, other.pred_sem_seg.data)
        foreground = other.seg_logits.data[1:].sigmoid()
        torch.testing.assert_close(foreground, one.seg_logits.data, atol=1e-4, rtol=1e-4)
    grown = load_checkpoint_safely(tmp_path / 'run/stage_1/snapshot.pth')['state_dict']
    assert [grown[f'{key}.conv_seg.bias'].shape[0] for key in ('decode_head', 'auxiliary_head')] == [7, 7]


def test_mmsegs_cascade_is_an_old_model(tmp_path: Path) -> None:
    mit = dict(MIT, type='MixVisionTransformer')
    heads = [
        dict(OCRNET['heads'][index], in_channels=MIT_CHANNELS[2], num_classes=3, loss_decode=CROSS_ENTROPY)
        for index in (0, 1)
    ]
    model = dict(
        type='CascadeEncoderDecoder', num_stages=2, backbone=mit, decode_head=heads, test_cfg=dict(mode='whole'),
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[0.0] * 3, std=[255.0] * 3),
    )  # fmt: skip
    Config(dict(model=model)).dump(tmp_path / 'old.py')
    stock = build(dict(model, test_cfg=ConfigDict(mode='whole'))).eval()
    classes = ['road', 'car', 'tree']
    write_weights(tmp_path / 'old.pth', stock.state_dict(), dict(dataset_meta=dict(classes=classes)))
    assert read_old_model(tmp_path / 'old.pth', tmp_path / 'old.py').channels == ('road', 'car', 'tree')
    own = dict(type='IncrementalEncoderDecoder', decode_head=dict(loss_decode='a loss'))
    cfg = Config(dict(model_config=str(tmp_path / 'old.py'), model=own))
    take_trained_model(cfg)
    assert cfg.model.decode_head.loss_decode == 'a loss'
    cfg.model.decode_head.update(num_classes=4, loss_decode=CROSS_ENTROPY)
    taken = build(cfg.model).eval()
    taken.load_state_dict(adopt_base(taken, tmp_path / 'old.pth', ['background', *classes]))
    with torch.no_grad():
        maps = stock.extract_feat(images())
        first = stock.decode_head[0](maps)
        last = stock.decode_head[1](maps, first)
        with_background = taken.decode_head(taken.extract_feat(images()))
    torch.testing.assert_close(with_background[1][:, 1:], first)
    assert with_background[0].shape[1] == last.shape[1] + 1
    losses = taken.loss(images(), samples(torch.zeros(2, 64, 64, dtype=torch.long)))
    assert {name for name in losses if 'loss' in name} == {'decode.0.loss_ce', 'decode.1.loss_ce'}
