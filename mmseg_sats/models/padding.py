# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Labels of a batch, and the padding of ``data_preprocessor.test_cfg``: mmseg pads the images, but not their labels."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_sats.models.segmentor_output import SegmentorOutput


def labels_of_batch(samples: Sequence[SegDataSample]) -> Tensor:
    """The labels (B, H, W) long of samples whose ``gt_sem_seg`` are (1, H, W)."""
    return torch.stack([sample.gt_sem_seg.data for sample in samples]).squeeze(1).long()


def padding_of(samples: Sequence[SegDataSample]) -> tuple[int, int, int, int]:
    """Pixels that mmseg's data preprocessor added to the images of a test batch: left, right, top, bottom.

    Args:
        samples: as the preprocessor returned them; all of a batch have the same padding.
    """
    left, right, top, bottom = samples[0].metainfo.get('img_padding_size', (0, 0, 0, 0))
    return int(left), int(right), int(top), int(bottom)


def without_padding(
    output: SegmentorOutput, samples: Sequence[SegDataSample], size: tuple[int, int]
) -> SegmentorOutput:
    """The output with logits of the images alone, as mmseg makes them for a prediction.

    Args:
        output: of padded images; returned as it is if nothing was padded.
        samples: of the same batch, as the data preprocessor returned them.
        size: (H, W) of the padded images.
    """
    left, right, top, bottom = padding_of(samples)
    if not left + right + top + bottom:
        return output

    def cropped(logits: Tensor) -> Tensor:
        whole = F.interpolate(logits, size, mode='bilinear', align_corners=output.align_corners)
        return whole[..., top : size[0] - bottom, left : size[1] - right]

    unknown = None if output.unknown is None else cropped(output.unknown)
    return dataclasses.replace(output, logits=cropped(output.logits), unknown=unknown)


def with_padding(
    labels: Tensor, samples: Sequence[SegDataSample], size: tuple[int, int], ignore_index: int = 255
) -> Tensor:
    """Labels that cover the padded images: ignored where these are padded.

    Args:
        labels: (B, H, W) integers, of the images before the padding or of their files; returned as they are
            if nothing was padded.
        samples: of the same batch, as the data preprocessor returned them.
        size: (H, W) of the padded images.
        ignore_index: the label of the padding.
    """
    left, right, top, bottom = padding_of(samples)
    if not left + right + top + bottom:
        return labels
    inner = (size[0] - top - bottom, size[1] - left - right)
    resized = F.interpolate(labels[:, None].double(), inner, mode='nearest')[:, 0].to(labels.dtype)
    return F.pad(resized, (left, right, top, bottom), value=ignore_index)
