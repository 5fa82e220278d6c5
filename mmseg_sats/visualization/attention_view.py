# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a class region, or a point, attends to in the old model and in the new one.

The numbers are those of the loss: ``pool`` of the attention maps, eq. (1) of Qiu et al., *SATS* (Pattern
Recognition 2023), of both models over the same region, and the distance between them, which
eq. (2) adds up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.models.padding import padding_of, with_padding
from mmseg_sats.models.segmentors.old_model import run_segmentor
from mmseg_sats.visualization.stage_model import StageModel
from mmseg_sats.visualization.theme import new_figure

HEAT = 'inferno'
CHANGE = 'PuOr'  # orange and violet: told apart by colour-blind people


@dataclass(eq=False)
class BlockView:
    """One encoder block's attention from a region.

    Args:
        old: (heads, h, w), the old model's mean attention of the region over the keys' grid.
        new: the new model's.
        covers: how much of the grid's height and width the image takes, from its top left; the rest is the
            padding of ``data_preprocessor.test_cfg``.
    """

    old: Tensor
    new: Tensor
    covers: tuple[float, float] = (1.0, 1.0)

    @property
    def distance(self) -> float:
        """Mean over the heads of the norm of the difference: the block's term in L_a."""
        return float(torch.linalg.vector_norm((self.new - self.old).flatten(1), dim=1).mean())

    @property
    def change(self) -> Tensor:
        """(h, w): the heads' root mean square difference, with the sign of the mean difference."""
        difference = self.new - self.old
        return difference.square().mean(0).sqrt() * difference.mean(0).sign()


def attentions(stage: StageModel, inputs: Tensor) -> tuple[BaseAttentionMap, ...]:
    """The attention maps of a stage's model for images (1, 3, H, W), preprocessed.

    Raises:
        ValueError: the backbone cannot name its queries and keys.
    """
    if not hasattr(stage.model.backbone, 'forward_with_attention'):
        raise ValueError(
            f'the backbone {type(stage.model.backbone).__name__} of {stage.folder} gives no '
            'self-attention: expected one with forward_with_attention, such as '
            'AttentionMixVisionTransformer'
        )
    with torch.no_grad():
        return run_segmentor(stage.model, inputs, with_attention=True)[0].attentions


def class_views(
    old: Sequence[BaseAttentionMap], new: Sequence[BaseAttentionMap], labels: Tensor, channel: int
) -> list[BlockView | None]:
    """The attention of a class region in every block.

    Args:
        old: the old model's maps of one image.
        new: the new model's.
        labels: (H, W) long, the image's labels.
        channel: the class, as in ``labels``.

    Returns:
        One view per block; None where the class has no position on the block's grid.
    """
    return [
        _class_view(one, other, labels, channel) for one, other in zip(old, new, strict=True)
    ]


def _class_view(
    old: BaseAttentionMap, new: BaseAttentionMap, labels: Tensor, channel: int
) -> BlockView | None:
    # The same resizing of labels as in crp_loss.
    grid = F.interpolate(labels[None, None].float(), old.query_hw, mode='nearest')[0].long()
    region = torch.where(grid == channel, 1, 0).to(old.query.device)
    if not region.any():
        return None
    return BlockView(*(_on_grid(maps, maps.pool(region)[0][0]) for maps in (old, new)))


def point_views(
    old: Sequence[BaseAttentionMap],
    new: Sequence[BaseAttentionMap],
    point: tuple[float, float],
    covers: tuple[float, float] = (1.0, 1.0),
) -> list[BlockView]:
    """The attention of one query position in every block.

    Args:
        old: the old model's maps of one image.
        new: the new model's.
        point: (x, y) in 0..1 of the image.
        covers: as in :class:`BlockView`.
    """
    views = []
    for one, other in zip(old, new, strict=True):
        height, width = one.query_hw
        x = min(int(point[0] * covers[1] * width), width - 1)
        y = min(int(point[1] * covers[0] * height), height - 1)
        place = y * width + x
        views.append(
            BlockView(
                *(_on_grid(maps, maps.rows(place, place + 1)[0, :, 0]) for maps in (one, other)), covers
            )
        )
    return views


def _on_grid(maps: BaseAttentionMap, values: Tensor) -> Tensor:
    # Keys that lie on no grid, such as ViT's class token, come first and have no place in a picture.
    return values[..., maps.extra_keys :].unflatten(-1, maps.key_hw).float().cpu()


def draw_attention(
    image: np.ndarray,
    views: Sequence[BlockView | None],
    what: str,
    where: np.ndarray | tuple[float, float],
) -> Figure:
    """A row per block: old model, new model, difference, over the photograph.

    Args:
        image: RGB (H, W, 3) uint8.
        views: one per block.
        what: the region's name, for the first picture's title.
        where: the region, (H, W) bool, or the point (x, y) in pixels.
    """
    ratio = image.shape[0] / image.shape[1]
    figure, axes = new_figure(0.55 + len(views) * (1.32 * ratio + 0.22), len(views), 3)
    for number, view in enumerate(views):
        row = axes[3 * number : 3 * number + 3]
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(f'block {number + 1}', fontsize=7.5)
        _draw_row(row, image, view, where)
    for ax, title in zip(axes, ('old model', 'new model', 'new - old'), strict=False):
        ax.set_title(title, fontsize=7.5)
    figure.suptitle(f'from: {what}', fontsize=8.5, x=0.01, ha='left')
    return figure


def _draw_row(
    row: Sequence[Axes],
    image: np.ndarray,
    view: BlockView | None,
    where: np.ndarray | tuple[float, float],
) -> None:
    if view is None:
        for ax in row:
            ax.imshow(image, alpha=0.35)
        row[1].set_xlabel('too small for this grid', fontsize=7)
        return
    old, new = view.old.mean(0).numpy(), view.new.mean(0).numpy()
    top = float(max(old.max(), new.max()))
    limit = float(view.change.abs().max()) or 1e-12
    for ax, values in zip(row, (old, new), strict=False):
        _heat(ax, image, values, view.covers, HEAT, 0, top)
        _mark(ax, where)
    _heat(row[2], image, view.change.numpy(), view.covers, CHANGE, -limit, limit)
    row[2].set_xlabel(f'distance {view.distance:.3g}', fontsize=7)


def _heat(
    ax: Axes,
    image: np.ndarray,
    values: np.ndarray,
    covers: tuple[float, float],
    colours: str,
    low: float,
    high: float,
) -> None:
    height, width = image.shape[:2]
    # The grid reaches beyond the image where that was padded.
    bottom, right = height / covers[0] - 0.5, width / covers[1] - 0.5
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    ax.imshow(grey, cmap='gray', vmin=-120, vmax=300)
    ax.imshow(values, cmap=colours, vmin=low, vmax=high, alpha=0.72, interpolation='nearest',
              extent=(-0.5, right, bottom, -0.5))
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)


def _mark(ax: Axes, where: np.ndarray | tuple[float, float]) -> None:
    """The region's outline, or a cross at the point."""
    if isinstance(where, np.ndarray):
        ax.contour(where.astype(float), levels=[0.5], colors='#00e5ff', linewidths=0.9)
    else:
        ax.plot(*where, 'x', color='#00e5ff', markersize=6, markeredgewidth=1.5)


def view_classes(
    old: StageModel, new: StageModel, sample: dict[str, Any], channel: int, labels: Tensor | None
) -> tuple[list[BlockView | None], Tensor]:
    """The views of a class in one packed sample, and the labels (H, W) they were found with.

    Args:
        old: the stage before.
        new: the stage.
        sample: a packed sample.
        channel: the class, in the new model's channels.
        labels: (H, W) long in these channels; None takes the new model's prediction.
    """
    labels = new.predict(sample) if labels is None else labels
    maps, covers, padded = padded_attentions(old, new, sample, labels)
    views = class_views(*maps, padded, channel)
    return [view and BlockView(view.old, view.new, covers) for view in views], labels


def padded_attentions(
    old: StageModel, new: StageModel, sample: dict[str, Any], labels: Tensor | None = None
) -> tuple[list[tuple[BaseAttentionMap, ...]], tuple[float, float], Tensor | None]:
    """The attention maps of both models for a packed sample, which the data preprocessor may pad.

    Args:
        old: the stage before.
        new: the stage.
        sample: a packed sample.
        labels: (H, W) long, of the image; or None.

    Returns:
        The maps of the old and of the new model, ``covers`` as in :class:`BlockView`, and the labels with
        ignored pixels for the padding.
    """
    maps = []
    for stage in (old, new):
        data = stage.preprocess(sample)
        maps.append(attentions(stage, data['inputs']))
    size, samples = data['inputs'].shape[-2:], data['data_samples']
    _, right, _, bottom = padding_of(samples)
    covers = ((size[0] - bottom) / size[0], (size[1] - right) / size[1])
    padded = None if labels is None else with_padding(labels[None], samples, size)[0]
    return maps, covers, padded
