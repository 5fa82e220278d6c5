# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Predictions of a batch: those of mmseg, without its copies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmseg.models.segmentors.base import BaseSegmentor
from mmseg.structures import SegDataSample

from mmseg_sats.models.segmentors.predictions import add_predictions
from tests.tensors import random_tensor

METAS: list[list[dict[str, Any]]] = [
    [dict(ori_shape=(8, 10)), dict(ori_shape=(8, 10))],
    [dict(ori_shape=(13, 7), padding_size=[0, 2, 0, 1]), dict(ori_shape=(7, 8), padding_size=[0, 2, 0, 1])],
    [dict(ori_shape=(5, 8), img_padding_size=[1, 1, 3, 0], padding_size=[0, 0, 0, 0]), dict(ori_shape=(8, 10))],
    [dict(ori_shape=(8, 10), flip=True, flip_direction='horizontal'),
     dict(ori_shape=(4, 5), flip=True, flip_direction='vertical', padding_size=[2, 0, 0, 0])],
]  # fmt: skip


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('metas', METAS)
def test_they_are_those_of_mmseg(metas: list[dict[str, Any]], align_corners: bool) -> None:
    logits = random_tensor(2, 5, 8, 10)
    ours, theirs = ([SegDataSample(metainfo=meta) for meta in metas] for _ in range(2))
    model = SimpleNamespace(align_corners=align_corners)
    found = add_predictions(logits, ours, align_corners)
    for own, expected in zip(found, BaseSegmentor.postprocess_result(model, logits, theirs), strict=True):
        for name in ('seg_logits', 'pred_sem_seg'):
            one, other = getattr(own, name).data, getattr(expected, name).data
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert found[0] is ours[0]


def test_without_samples_the_logits_stay_as_they_are() -> None:
    logits = random_tensor(2, 5, 8, 10)
    found = add_predictions(logits, None, False)
    assert [sample.pred_sem_seg.data.tolist() for sample in found] == logits.argmax(1, keepdim=True).tolist()
    assert torch.equal(found[1].seg_logits.data, logits[1])
