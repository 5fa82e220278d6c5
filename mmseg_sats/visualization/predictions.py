# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Overlays of a model's predictions: which images, how they are read and drawn."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmseg.apis import inference_model
from mmseg.registry import TRANSFORMS
from torch import nn

from mmseg_sats.datasets.folder import IMAGE_SUFFIXES
from mmseg_sats.visualization.masks import rgb_image
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


def read_image(model: nn.Module, path: Path) -> np.ndarray:
    """A file as the model's test pipeline loads it, for showing: RGB (H, W, 3) uint8.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    results: Any = dict(img_path=str(path))
    try:
        path.stat()
        for step in model.cfg.test_pipeline:
            results = TRANSFORMS.build(copy.deepcopy(dict(step)))(results)
            if results.get('img') is not None:
                break
        image = np.atleast_3d(results['img'])
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    except Exception as error:  # a user's own loader may raise anything
        raise ValueError(f'{path} is no image, or a broken one: {error}') from error
    return rgb_image(torch.from_numpy(image).permute(2, 0, 1))


def predicted_overlay(model: nn.Module, path: Path) -> np.ndarray:
    """The overlay of one image, see :func:`draw_overlay`.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    image = read_image(model, path)
    labels = inference_model(model, str(path)).pred_sem_seg.data[0].cpu().numpy()
    meta = model.dataset_meta
    return draw_overlay(image, labels, meta['classes'], meta['palette'])
