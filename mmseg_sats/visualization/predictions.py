# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Overlays of a model's predictions: which images, how they are read, drawn and written."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmseg.apis import inference_model
from torch import nn

from mmseg_sats.datasets.folder import IMAGE_SUFFIXES
from mmseg_sats.utils.checkpoint import write_atomically
from mmseg_sats.visualization.overlay import draw_overlay


def find_images(given: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each image with the name of its overlay, all different.

    Args:
        given: files, taken whatever their suffix, and folders, of which the images are taken.
    """
    found, names = [], set()
    for place in given:
        paths = [place]
        if place.is_dir():
            paths = sorted(p for p in place.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
        for path in paths:
            name, number = path.stem, 2
            while name in names:
                name, number = f'{path.stem}_{number}', number + 1
            names.add(name)
            found.append((path, f'{name}.png'))
    return found


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, BGR.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    try:
        image = mmcv.imfrombytes(path.read_bytes(), flag='color')
    except (OSError, cv2.error) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    if image is None:
        raise ValueError(f'{path} is no image, or a broken one')
    return image


def predicted_overlay(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """The overlay of one image, see :func:`draw_overlay`."""
    labels = inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()
    meta = model.dataset_meta
    return draw_overlay(image, labels, meta['classes'], meta['palette'])


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a picture (H, W, 3) uint8, BGR; the file is there whole or not at all."""
    png = cv2.imencode('.png', picture)[1].tobytes()
    write_atomically(path, lambda file: file.write(png))
