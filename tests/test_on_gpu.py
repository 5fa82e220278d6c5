# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What has a way of its own on a GPU (larger pieces, other kernels) gives there what it gives on a CPU."""

from dataclasses import replace

import pytest
import torch
from mmseg.models import EncoderDecoder
from torch import Tensor

from mmseg_sats.functional import resizing
from mmseg_sats.functional.attention import attention_map as attention
from mmseg_sats.functional.attention.attention_map import AttentionMap
from mmseg_sats.models.losses import UnbiasedDistillationLoss, crp_loss
from mmseg_sats.models.pixel_losses.shared import shared_losses
from mmseg_sats.models.segmentor_output import SegmentorOutput, labelling_chunks
from mmseg_sats.models.segmentors.old_model import OldModel
from tests.tensors import random_labels, random_tensor
from tests.test_shared_losses import head

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

DEVICES = ('cpu', 'cuda')
SIZES = [1, 3000, 10**7]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return dict(rtol=1e-9, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('chunk', [*SIZES, 'fused'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('pooling', ['class', 'global', 'none'])
def test_attention_loss(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, pooling: str, chunk: int | str
) -> None:
    if chunk == 'fused':
        kernels = attention._fused_kernels(torch.device('cuda', 0))
        if not kernels or dtype == torch.float64 or pooling == 'none':
            pytest.skip('not what the kernels are for')
        monkeypatch.setattr(attention, '_RegionMean', None)
    else:
        monkeypatch.setattr(attention, '_fused_kernels', lambda device: None)
        monkeypatch.setattr(attention, 'DEFAULT_CHUNK_ELEMENTS', chunk)
    labels = random_labels(3, 24, 32, classes=6)
    labels[1] = 0
    shapes = [(1, (12, 16), (3, 4)), (2, (6, 8), (3, 4)), (5, (3, 4), (3, 4))]
    found = []
    for device in reversed(DEVICES):
        if device == 'cpu':
            monkeypatch.undo()
        models = [
            [
                AttentionMap(
                    *(
                        random_tensor(3, heads, grid[0] * grid[1], 8, seed=seed + index)
                        .to(device, dtype)
                        .requires_grad_()
                        for seed, grid in ((7, query_hw), (8, key_hw))
                    ),
                    0.3,
                    query_hw,
                    key_hw,
                )
                for heads, query_hw, key_hw in shapes
            ]
            for index in (0, 10)
        ]
        loss = crp_loss(*models, labels.to(device), pooling=pooling)
        inputs = [tensor for own in models[0] for tensor in (own.query, own.key)]
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), expected, **tolerance(dtype))


@pytest.mark.parametrize('elements', SIZES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_losses_over_pixels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, elements: int
) -> None:
    monkeypatch.setattr(resizing, 'DEFAULT_ELEMENTS', elements)
    labels = random_labels(3, 22, 30, classes=6)
    found = []
    for device in DEVICES:
        x, old = (
            random_tensor(3, channels, 7, 9, seed=channels).to(device, dtype) for channels in (6, 4)
        )
        student, teacher = SegmentorOutput(x.requires_grad_(), ()), SegmentorOutput(old, ())
        parts = {'output': UnbiasedDistillationLoss(20.0)}
        losses = shared_losses(head(), parts, student, teacher, labels.to(device))
        loss = losses['decode.loss_ce'] + losses['loss_output']
        found.append([loss.detach(), losses['decode.acc_seg'], *torch.autograd.grad(loss, x)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), expected, **tolerance(dtype))


@pytest.mark.parametrize('elements', SIZES)
def test_logits_for_labels(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(resizing, 'DEFAULT_ELEMENTS', elements)
    output = SegmentorOutput(random_tensor(4, 5, 7, 9), ())
    expected = output.labelling_logits((22, 30)).argmax(1)
    labels = torch.zeros(4, 22, 30, dtype=torch.long, device='cuda')
    on_gpu = replace(output, logits=output.logits.cuda())
    for piece, (logits,) in labelling_chunks(labels, [on_gpu], [0, 1, 3]):
        piece.copy_(logits.argmax(1))
    chosen: Tensor = labels.cpu()
    assert torch.equal(chosen[[0, 1, 3]], expected[[0, 1, 3]])
    assert not chosen[2].any()


@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_an_old_model_run_from_a_graph_gives_the_same(dtype: torch.dtype | None) -> None:
    """Also with other images than those that were captured, and with a last batch of fewer."""
    backbone = dict(
        type='AttentionMixVisionTransformer', embed_dims=32, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8]
    )
    decode_head = dict(
        type='LeanSegformerHead', in_channels=[32, 64, 160, 256], in_index=[0, 1, 2, 3], channels=64, num_classes=5,
        norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss'),
    )  # fmt: skip
    graphed = OldModel(EncoderDecoder(backbone, decode_head, test_cfg=dict(mode='whole')), graphed=True)
    for images in (4, 4, 4, 4, 4, 2, 4):
        inputs = torch.randn(images, 3, 128, 128, device='cuda')
        with torch.autocast('cuda', dtype=dtype, enabled=dtype is not None):
            expected = graphed(inputs, with_attention=True)
            assert expected.equals(graphed.in_training(inputs, with_attention=True))
    assert graphed.graphed_pass.captured
