# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Segmentors small enough for a test: a Mix Transformer of one thin layer a block, or a thin ResNet."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import mmseg_sats  # noqa: F401  registers everything

CROSS_ENTROPY = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
MIT = dict(
    embed_dims=8,
    num_layers=[1, 1, 1, 1],
    num_heads=[1, 2, 2, 4],
    qkv_bias=True,
    drop_path_rate=0.0,
)
MIT_CHANNELS = [8, 16, 16, 32]
RESNET = dict(
    type='ResNet', depth=18, base_channels=4, stem_channels=4, norm_cfg=dict(type='BN'), style='pytorch'
)
RESNET_CHANNELS = [4, 8, 16, 32]


def decode_head_cfg(num_classes: int, channels: list[int], **options: Any) -> dict[str, Any]:
    """A SegformerHead without dropout, so that a step can be repeated."""
    cfg = dict(
        type='SegformerHead',
        in_channels=channels,
        in_index=[0, 1, 2, 3],
        channels=8,
        dropout_ratio=0.0,
        num_classes=num_classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=CROSS_ENTROPY,
    )
    return cfg | options


def auxiliary_head_cfg(num_classes: int, index: int = 1) -> dict[str, Any]:
    return dict(
        type='FCNHead',
        in_channels=MIT_CHANNELS[index],
        in_index=index,
        channels=6,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=num_classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=CROSS_ENTROPY | dict(loss_weight=0.4),
    )


def model_cfg(num_classes: int, resnet: bool = False, **options: Any) -> dict[str, Any]:
    """Config of an IncrementalEncoderDecoder; ``options`` are more of its arguments."""
    backbone = RESNET if resnet else dict(MIT, type='AttentionMixVisionTransformer')
    channels = RESNET_CHANNELS if resnet else MIT_CHANNELS
    return dict(
        type='IncrementalEncoderDecoder',
        backbone=dict(backbone),
        decode_head=decode_head_cfg(num_classes, channels),
        train_cfg=dict(),
        test_cfg=ConfigDict(mode='whole'),
    ) | options


def build(cfg: dict[str, Any], seed: int = 0) -> nn.Module:
    """The model with random weights large enough for its outputs to differ from pixel to pixel."""
    init_default_scope('mmseg')
    torch.manual_seed(seed)
    model = MODELS.build(cfg)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith('conv_seg.bias'):
            nn.init.normal_(parameter, std=0.5)
    return model


def save_weights(model: nn.Module, path: Path) -> str:
    """Writes a snapshot of ``model`` and returns its path."""
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return str(path)


def images(batch: int = 2, height: int = 64, width: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def samples(labels: Tensor) -> list[SegDataSample]:
    """Data samples of labels (B, H, W)."""
    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
