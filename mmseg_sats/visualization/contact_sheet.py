# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Contact sheets: training pictures as the model gets them, with their labels at every step."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.structures import PixelData
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.registry import TRANSFORMS
from torch import Tensor

from mmseg_sats.datasets.folder import IGNORED_COLOUR
from mmseg_sats.models.padding import labels_of_batch
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.segmentors.incremental_encoder_decoder import IncrementalEncoderDecoder
from mmseg_sats.protocol import UNKNOWN_LABEL
from mmseg_sats.visualization.masks import colour_mask, rgb_image
from mmseg_sats.visualization.theme import MUTED, new_figure, unit_colour

Palette = Sequence[Sequence[int]]


@TRANSFORMS.register_module()
class LoadFullAnnotations(LoadAnnotations):
    """mmseg's ``LoadAnnotations`` that keeps a second copy of the labels through all transforms.

    ``IncrementalDataset`` replaces the labels behind it by the stage's; the copy, ``gt_full_map``,
    is cropped and flipped along with them.
    """

    def transform(self, results: dict) -> dict:
        """Adds ``gt_seg_map`` and its copy ``gt_full_map``, both named in ``seg_fields``."""
        results = super().transform(results)
        results['gt_full_map'] = results['gt_seg_map'].copy()
        results['seg_fields'].append('gt_full_map')
        return results


@TRANSFORMS.register_module()
class PackFullInputs(PackSegInputs):
    """mmseg's ``PackSegInputs`` that also packs ``gt_full_map`` and where the sample came from."""

    def transform(self, results: dict) -> dict:
        """Packs the sample; ``source`` in the metainfo is ``'stage'`` unless it was set before."""
        packed = super().transform(results)
        sample = packed['data_samples']
        # Images that come without annotations have the labels that they were given.
        full = results.get('gt_full_map', results['gt_seg_map'])
        full = torch.from_numpy(full.astype(np.int64))
        if full.shape != sample.gt_sem_seg.shape:
            raise ValueError(
                f'a transform changed the labels to {tuple(sample.gt_sem_seg.shape)} and not the '
                f"other maps in 'seg_fields' ({tuple(full.shape)}): it must treat all of them alike"
            )
        sample.gt_full_map = PixelData(data=full[None])
        if 'source' not in sample.metainfo:
            sample.set_metainfo(dict(source=results.get('source', 'stage')))
        return packed


def keep_full_labels(cfg: Any) -> Any:
    """A copy of a dataset's config whose samples carry ``gt_full_map``, at any depth."""
    swapped = {'LoadAnnotations': 'LoadFullAnnotations', 'PackSegInputs': 'PackFullInputs'}
    if isinstance(cfg, Mapping):
        result = copy.copy(cfg)
        for key, value in cfg.items():
            result[key] = keep_full_labels(value)
        if isinstance(cfg.get('type'), str) and cfg['type'] in swapped:
            result['type'] = swapped[cfg['type']]
        return result
    if isinstance(cfg, list | tuple):
        return type(cfg)(keep_full_labels(item) for item in cfg)
    return cfg


@dataclass(eq=False)
class TrainingPicture:
    """One training sample; all maps are (h, w) of its crop.

    Args:
        name: the image file's name.
        source: where the sample comes from: ``'stage'``, or for example ``'memory'``.
        image: RGB (h, w, 3) uint8.
        full: annotation ids, as in the mask file.
        labels: the stage's channels.
        completed: the channels after pseudo-labelling; None without a pseudo-labeler or old model.
    """

    name: str
    source: str
    image: np.ndarray
    full: np.ndarray
    labels: np.ndarray
    completed: np.ndarray | None = None


def training_pictures(
    samples: Sequence[dict[str, Any]], model: IncrementalEncoderDecoder | None
) -> list[TrainingPicture]:
    """The samples for showing.

    Args:
        samples: packed by :class:`PackFullInputs`.
        model: completes the labels if it has an old model and a pseudo-labeler that is ready;
            otherwise None.
    """
    return [_picture(sample, model) for sample in samples]


@torch.no_grad()
def _picture(sample: dict[str, Any], model: IncrementalEncoderDecoder | None) -> TrainingPicture:
    data = sample['data_samples']
    labels = data.gt_sem_seg.data[0]
    completed = None
    if model is not None:
        # Images from a memory keep their true labels.
        own = data.source == 'stage'
        completed = (_completed(sample, labels, model) if own else labels).numpy()
    return TrainingPicture(
        Path(data.img_path).name,
        data.source,
        rgb_image(sample['inputs']),
        data.gt_full_map.data[0].numpy(),
        labels.numpy(),
        completed,
    )


def _completed(sample: dict[str, Any], labels: Tensor, model: IncrementalEncoderDecoder) -> Tensor:
    """The labels (h, w) as the loss sees them, without the preprocessor's padding."""
    batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples'].clone()])
    data = model.data_preprocessor(batch, True)
    padded, unknown = model.without_unknown(labels_of_batch(data['data_samples']))
    labelers = dict(stage=model.pseudo_labeler)
    completed, _ = complete_labels(padded, data['data_samples'], labelers, None, model.old_model(data['inputs']))
    completed = completed.masked_fill(unknown & (completed == 0), UNKNOWN_LABEL)
    return completed[0, : labels.shape[0], : labels.shape[1]].cpu()


def draw_sheet(
    pictures: Sequence[TrainingPicture],
    full: tuple[Sequence[str], Palette],
    stage: tuple[Sequence[str], Palette],
    title: str,
) -> Figure:
    """A row per picture: crop, full mask, the stage's labels, and these with pseudo-labels.

    Args:
        pictures: at least one.
        full: names and colours by annotation id.
        stage: names and colours by channel.
        title: stands above.
    """
    columns = ['crop', 'full mask', "stage's labels"]
    if any(picture.completed is not None for picture in pictures):
        columns.append('with pseudo-labels')
    size = 1.5
    names = sorted({int(c) for picture in pictures for c in np.unique(picture.full)} - {0, 255})
    height = 0.8 + (size + 0.22) * len(pictures) + 0.16 * (1 + len(names) // 4)
    figure, axes = new_figure(height, len(pictures), len(columns), size * len(columns) + 0.2)
    for i, picture in enumerate(pictures):
        row = axes[i * len(columns) : (i + 1) * len(columns)]
        maps = [
            picture.image,
            colour_mask(picture.full, full[1]),
            colour_mask(picture.labels, stage[1]),
        ]
        if picture.completed is not None:
            maps.append(colour_mask(picture.completed, stage[1]))
        for ax, shown in zip(row, maps, strict=False):
            ax.imshow(shown, interpolation='none')
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_xlabel(f'{picture.name}: from {picture.source}', fontsize=7, loc='left')
        if i == 0:
            for ax, column in zip(row, columns, strict=True):
                ax.set_title(column, fontsize=8)
    handles = [_patch(full[0][c], full[1][c]) for c in names] + [_patch('ignored', IGNORED_COLOUR)]
    figure.legend(handles=handles, loc='outside lower left', ncols=4, fontsize=7)
    figure.suptitle(title, fontsize=9, x=0.01, ha='left')
    return figure


def _patch(name: str, colour: Sequence[int]) -> Patch:
    return Patch(facecolor=unit_colour(colour), edgecolor=MUTED, linewidth=0.6, label=name)
