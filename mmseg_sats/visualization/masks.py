# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draws masks in their palette, alone or over photographs, and encodes arrays as image files."""

from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor

from mmseg_sats.datasets.folder import IGNORED, IGNORED_COLOUR


def rgb_image(inputs: Tensor) -> np.ndarray:
    """A packed image (C, H, W), BGR as mmcv reads it, as RGB (H, W, 3) uint8.

    Of more than three bands the first three are shown, and of fewer the last one in the place of what lacks.
    Values beyond those of a photograph are scaled to black and white.
    """
    bands = inputs[[min(band, len(inputs) - 1) for band in (2, 1, 0)]].permute(1, 2, 0).cpu().numpy()
    if bands.dtype != np.uint8 and (len(inputs) != 3 or bands.min() < 0 or bands.max() > 255):
        low, high = float(bands.min()), float(bands.max())
        if low < 0 or high > 255 or high <= 1:
            bands = (bands - low) * (255 / max(high - low, 1e-9))
    return np.ascontiguousarray(bands.astype(np.uint8))


def colour_mask(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels (H, W) in their colours, RGB (H, W, 3) uint8.

    Args:
        labels: indices into ``palette``, or 255 for ignored pixels, which have a pale colour of their own.
        palette: RGB 0..255 of each label.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    table[IGNORED] = IGNORED_COLOUR
    return table[labels.astype(np.uint8)]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Sequence[int]],
    strength: float = 0.65,
) -> np.ndarray:
    """The photograph with its classes in colour and outlined, background as it is: RGB (H, W, 3) uint8.

    Args:
        image: RGB (H, W, 3) uint8.
        labels: (H, W), as in :func:`colour_mask`; 0 is background.
        palette: RGB 0..255 of each label.
        strength: how much of the colour, 0 to 1.
    """
    colours = colour_mask(labels, palette)
    mixed = cv2.addWeighted(image, 1 - strength, colours, strength, 0)
    result = np.where((labels == 0)[..., None], image, mixed)
    edges = outline(labels)
    result[edges] = colours[edges]
    return result


def outline(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a class whose neighbour above or to the left has another label."""
    edges = np.zeros(labels.shape, bool)
    edges[1:] |= labels[1:] != labels[:-1]
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return edges & (labels != 0)


def fit(image: np.ndarray, longest: int) -> np.ndarray:
    """The image at a long side of at most ``longest`` pixels; a smaller one stays as it is."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode(image: np.ndarray, suffix: str) -> bytes:
    """RGB (H, W, 3) uint8 as the bytes of a ``'.png'`` or ``'.jpg'`` file."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 88] if suffix == '.jpg' else []
    done, buffer = cv2.imencode(suffix, np.ascontiguousarray(image[..., ::-1]), options)
    if not done:
        raise ValueError(f'cannot encode an image of shape {image.shape} as {suffix}')
    return buffer.tobytes()
