# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Finds transforms that mix the labels of neighbouring pixels, which gives labels that nobody drew."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations

from mmseg_sats.datasets.transforms import RelabelSegMap
from mmseg_sats.utils.randomness import seeded

_TRIES = 8
_LOW, _HIGH, _SIDE = 0, 254, 64
# One new label may be what the transform pads with or maps to; mixing gives many.
_FEW = 2


def check_whole_labels(transforms: Sequence[Callable], where: str) -> None:
    """Tries transforms on a mask of two labels, and refuses one that makes labels between them.

    Transforms that cannot be tried alone, because they need more than an image and a mask, are left out. The
    generators of random numbers are left as they were.

    Args:
        transforms: of a pipeline, built.
        where: the pipeline's name, for the message.

    Raises:
        ValueError: a transform interpolates between labels.
    """
    for transform in transforms:
        if isinstance(transform, LoadAnnotations | RelabelSegMap):
            continue
        made = sorted(set().union(*_labels_made(transform)) - {_LOW, _HIGH, 255})
        if len(made) > _FEW:
            raise ValueError(
                f'{where}: {type(transform).__name__} mixes the labels of neighbouring pixels: out of {_LOW} and '
                f'{_HIGH} it made {", ".join(map(str, made[:3]))} and others, labels that are in no mask; expected a '
                'transform that takes the nearest label, such as RandomRotate'
            )


def _labels_made(transform: Callable) -> Iterator[set[int]]:
    for number in range(_TRIES):
        with suppress(Exception), seeded(number):
            seg = transform(_sample()).get('gt_seg_map')
            yield set(np.unique(seg).tolist()) if isinstance(seg, np.ndarray) else set()


def _sample() -> dict[str, Any]:
    """What mmseg's loaders give of a black image whose mask has two halves."""
    seg = np.full((_SIDE, _SIDE), _LOW, np.uint8)
    seg[:, _SIDE // 2 :] = _HIGH
    return dict(
        img=np.zeros((_SIDE, _SIDE, 3), np.uint8), gt_seg_map=seg, seg_fields=['gt_seg_map'], img_path='', flip=False,
        img_shape=(_SIDE, _SIDE), ori_shape=(_SIDE, _SIDE), scale_factor=(1.0, 1.0), reduce_zero_label=False,
    )  # fmt: skip
