# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The panel of photographs: truth and every run's prediction, the same pictures for all runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from mmseg_sats.visualization.masks import fit, overlay, rgb_image
from mmseg_sats.visualization.stage_model import StageModel
from mmseg_sats.visualization.theme import new_figure


@dataclass(eq=False)
class PanelRow:
    """One photograph.

    Args:
        name: its file's name.
        classes: names of the classes in its truth.
        shown: names of the classes in its truth or in a prediction.
        ignored: whether its truth has ignored pixels.
        tiles: caption to RGB (h, w, 3) uint8: the photograph, its truth, then each run.
    """

    name: str
    classes: list[str]
    shown: set[str]
    ignored: bool
    tiles: dict[str, np.ndarray]


def choose_images(presence: np.ndarray, count: int) -> list[int]:
    """Images that show as many classes as they can: each adds the most classes not shown yet.

    Neighbours in the list are often frames of one video. Among images that add equally many classes, or none, one
    far from those chosen is taken.

    Args:
        presence: (N, K) bool, which foreground classes each image has.
        count: how many images.

    Returns:
        At most ``count`` indices, the same for the same data; ties go to the earlier image.
    """
    chosen: list[int] = []
    shown = np.zeros(presence.shape[1], bool)
    places = np.arange(len(presence))
    for _ in range(min(count, len(presence))):
        far = np.ones(len(presence), bool)
        for one in chosen:
            far &= abs(places - one) >= len(presence) / (2 * count)
        gain = (presence & ~shown).sum(1) + 0.5 * far
        if gain.max() < 1:  # everything is shown: begin again, and elsewhere
            shown[:] = False
            gain = presence.sum(1) + presence.shape[1] * far.astype(float)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        shown |= presence[chosen[-1]]
    return chosen


def panel_samples(dataset: Any, count: int) -> list[dict[str, Any]]:
    """Packed samples of the chosen evaluation images, of an ``IncrementalDataset``."""
    classes = list(dataset.stage.seen)
    return [dataset[index] for index in choose_images(dataset.presence[:, classes], count)]


def panel_rows(
    models: dict[str, StageModel], samples: Sequence[dict[str, Any]], longest: int = 320
) -> list[PanelRow]:
    """The photographs with truth and predictions.

    Args:
        models: label of the run to its model; the first one's classes are those of the truth.
        samples: packed evaluation samples.
        longest: pixels of a tile's long side.
    """
    first = next(iter(models.values()))
    return [_row(models, first, sample, longest) for sample in samples]


def _row(
    models: dict[str, StageModel], first: StageModel, sample: dict[str, Any], longest: int
) -> PanelRow:
    labels = sample['data_samples'].gt_sem_seg.data[0].numpy()
    image = sample_image(sample)
    tiles = {'image': fit(image, longest)}
    tiles['truth'] = fit(overlay(image, labels, first.palette), longest)
    present = _names(first, labels)
    shown = set(present)
    for label, model in models.items():
        prediction = model.predict(sample).numpy()
        tiles[label] = fit(overlay(image, prediction, model.palette), longest)
        shown.update(_names(model, prediction))
    ignored = bool((labels >= len(first.classes)).any())
    return PanelRow(Path(sample['data_samples'].img_path).name, present, shown, ignored, tiles)


def _names(model: StageModel, labels: np.ndarray) -> list[str]:
    """Names of the foreground classes in labels (H, W)."""
    return [model.classes[c] for c in np.unique(labels) if 0 < c < len(model.classes)]


def sample_image(sample: dict[str, Any]) -> np.ndarray:
    """The photograph of a packed sample at its labels' size, RGB (H, W, 3) uint8.

    mmseg compares at the file's size: labels may be loaded before the image is resized.
    """
    image = rgb_image(sample['inputs'])
    height, width = sample['data_samples'].gt_sem_seg.data.shape[-2:]
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def draw_panel(rows: Sequence[PanelRow]) -> Figure:
    """The panel as one figure for a paper: a row per photograph, a column per run."""
    columns = list(rows[0].tiles)
    ratio = max(tile.shape[0] / tile.shape[1] for row in rows for tile in row.tiles.values())
    size = 1.35
    figure, axes = new_figure(
        0.3 + size * min(ratio, 1.5) * len(rows), len(rows), len(columns), size * len(columns)
    )
    for i, row in enumerate(rows):
        for j, name in enumerate(columns):
            ax = axes[i * len(columns) + j]
            ax.imshow(row.tiles[name], interpolation='none')
            ax.axis('off')
            if i == 0:
                ax.set_title(name, fontsize=7.5)
    return figure
