# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The predicted classes of images from their logits: what mmseg's ``postprocess_result`` computes, in less time."""

from collections.abc import Mapping
from typing import Any

from mmengine.structures import PixelData
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample
from mmseg.utils import OptSampleList, SampleList
from torch import Tensor

from mmseg_sats.functional.best_channel import best_channel

_FLIPPED_AXIS = {'horizontal': -1, 'vertical': -2}


def add_predictions(logits: Tensor, samples: OptSampleList, align_corners: bool) -> SampleList:
    """Adds ``seg_logits`` (K, h, w) and ``pred_sem_seg`` (1, h, w), the channel of the largest, to each sample.

    mmseg's also resizes logits that have the image's size already, and takes torch's ``argmax``.

    Args:
        logits: (B, K, H, W), K > 1, of the padded and perhaps flipped images. Those of a single image are not copied.
        samples: those of the images, whose logits are brought to the size of the image's file; or None for new
            samples, with the logits as they are.
        align_corners: how logits are resized.
    """
    if samples is None:
        samples = [SegDataSample() for _ in logits]
    else:
        logits = [
            _at_original_size(one if len(logits) == 1 else one.clone(), sample.metainfo, align_corners)
            for one, sample in zip(logits, samples, strict=True)
        ]
    for one, sample in zip(logits, samples, strict=True):
        channel = best_channel(one[None])[1]
        sample.set_data(dict(seg_logits=PixelData(data=one), pred_sem_seg=PixelData(data=channel)))
    return samples


def _at_original_size(logits: Tensor, meta: Mapping[str, Any], align_corners: bool) -> Tensor:
    """Logits (K, H, W) without padding and flip, at the size of the image's file."""
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    _, height, width = logits.shape
    logits = logits[:, top : height - bottom, left : width - right]
    if meta.get('flip'):
        logits = logits.flip(_FLIPPED_AXIS[meta['flip_direction']])
    size = tuple(meta['ori_shape'][:2])
    if logits.shape[1:] == size:
        return logits.contiguous()
    return resize(logits[None], size, mode='bilinear', align_corners=align_corners, warning=False)[0]
