# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A segmentation drawn over its image, with a legend of the classes found."""

from collections.abc import Sequence

import cv2
import numpy as np

from mmseg_sats.visualization.masks import overlay

_FONT, _SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
_ROW, _SWATCH, _GAP, _MIN_WIDTH = 22, 14, 8, 240


def draw_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> np.ndarray:
    """The image under its classes' colours, see :func:`overlay`, and the legend below it.

    Args:
        image: RGB (H, W, 3) uint8.
        labels: (H, W), a channel per pixel, 0 is background.
        classes: names by channel.
        palette: (r, g, b) by channel.

    Returns:
        RGB (H', W', 3) uint8: the image at its own size in the top left corner; wider than that
        only where the legend needs it.

    Raises:
        ValueError: image and labels differ in size.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f'the image has {image.shape[:2]} pixels, its labels {labels.shape}')
    picture = overlay(image, labels, palette, strength=0.5)
    return _above(picture, draw_legend(labels, classes, palette, max(image.shape[1], _MIN_WIDTH)))


def draw_legend(
    labels: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]], width: int
) -> np.ndarray:
    """Colour, name and share of pixels of each class found, the largest first; background has no colour.

    Args:
        labels: (H, W), a channel per pixel.
        classes: names by channel.
        palette: (r, g, b) by channel.
        width: of the legend, in pixels; a name longer than that widens it.

    Returns:
        RGB (rows * 22, at least width, 3) uint8 on white.
    """
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    found = [int(i) for i in np.argsort(-counts, kind='stable') if counts[i]]
    texts = [f'{classes[i]} {100 * counts[i] / labels.size:.1f}%' for i in found]
    sizes = [_GAP + _SWATCH + _GAP + _text_width(text) + _GAP for text in texts]
    places, x, row = [], 0, 0
    for size in sizes:
        if x and x + size > width:
            x, row = 0, row + 1
        places.append((x, row * _ROW))
        x += size
    legend = np.full(((row + 1) * _ROW, max([width, *sizes]), 3), 255, np.uint8)
    for index, text, (left, top) in zip(found, texts, places, strict=True):
        corner = (left + _GAP, top + 4)
        opposite = (corner[0] + _SWATCH, corner[1] + _SWATCH)
        if index:  # background is the image itself
            cv2.rectangle(legend, corner, opposite, [int(value) for value in palette[index]], cv2.FILLED)
        cv2.rectangle(legend, corner, opposite, (90, 90, 90), 1)
        at = (opposite[0] + _GAP, top + 16)
        cv2.putText(legend, text, at, _FONT, _SCALE, (20, 20, 20), 1, cv2.LINE_AA)
    return legend


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, _FONT, _SCALE, 1)[0][0]


def _above(picture: np.ndarray, legend: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    sheet = np.full((height + len(legend), max(width, legend.shape[1]), 3), 255, np.uint8)
    sheet[:height, :width] = picture
    sheet[height:, : legend.shape[1]] = legend
    return sheet
