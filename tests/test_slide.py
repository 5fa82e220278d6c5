# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A model that is tested in windows: passes of the old model over whole images see them so too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmseg.models import EncoderDecoder

from mmseg_sats.engine.export.stock import export_stage
from mmseg_sats.models.heads.classifier_form import ClassifierForm
from mmseg_sats.models.segmentors.old_model import OldModel

WINDOWS = dict(mode='slide', crop_size=(32, 32), stride=(24, 20))
BEIT = dict(
    type='BEiT', img_size=(32, 32), patch_size=8, embed_dims=32, num_layers=2, num_heads=2, mlp_ratio=2,
    out_indices=(0, 1),
)  # fmt: skip
HEAD = dict(type='FCNHead', in_channels=32, in_index=1, channels=16, num_convs=1)
SEGMENTER = dict(
    type='SegmenterMaskTransformerHead', in_channels=32, in_index=1, channels=16, num_layers=1, num_heads=2,
    embed_dims=8,
)  # fmt: skip


@pytest.mark.parametrize(('head', 'unknown'), [(HEAD, False), (HEAD, True), (SEGMENTER, False)])
@torch.no_grad()
def test_logits_of_windows_are_those_of_mmsegs_prediction(head: dict[str, Any], unknown: bool) -> None:
    torch.manual_seed(0)
    stock = EncoderDecoder(BEIT, head | dict(num_classes=4), test_cfg=ConfigDict(WINDOWS)).eval()
    images = torch.randn(2, 3, 45, 70)
    expected = stock.slide_inference(images, [{}])
    if unknown:
        classifier = stock.decode_head.conv_seg.state_dict()
        ClassifierForm(unknown=True).shape('decode_head', stock.decode_head, (), 4)
        stock.decode_head.conv_seg.load_state_dict(classifier, strict=False)
    output = OldModel(stock).on_test_images(images, WINDOWS)
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert output.resized((45, 70)) is output.logits
    assert output.unknown.shape == (2, 1, 45, 70) if unknown else output.unknown is None


@torch.no_grad()
def test_whole_images_are_seen_at_once() -> None:
    old = OldModel(EncoderDecoder(BEIT, HEAD | dict(num_classes=4)))
    images = torch.randn(1, 3, 32, 32)
    for test_cfg in (None, dict(mode='whole')):
        assert torch.equal(old.on_test_images(images, test_cfg).logits, old(images).logits)


def test_an_encoder_of_one_size_is_trained_with_pseudo_labels_and_exported(
    shapes_cfg: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = shapes_cfg('sats', protocol='3-3', crop_size=32)
    cfg.distillation.attention.update(source='feature', blocks=(0, 1))
    cfg.model.backbone = BEIT
    cfg.model.decode_head = HEAD | dict(num_classes='$num_channels', loss_decode='$segmentation_loss')
    cfg.model.test_cfg = WINDOWS
    RUNNERS.build(cfg).train()
    export_stage(Path(cfg.work_dir) / 'stage_1', tmp_path / 'export')
    assert (tmp_path / 'export/model.pth').exists()
