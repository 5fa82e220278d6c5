# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Loads the model of a finished stage, and its input, from ``stage_k`` alone, ready to predict."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from torch import Tensor, nn

from mmseg_sats.datasets.class_index.mask_scan import read_labels
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from mmseg_sats.utils.user_modules import read_file


@dataclass(eq=False)
class StageModel:
    """The model as a stage left it, in eval mode.

    Args:
        folder: the stage's ``stage_k``.
        cfg: its config.
        model: the segmentor with the snapshot's weights.
        classes: names of background and the classes seen, by channel.
        palette: their colours, RGB 0..255.
    """

    folder: Path
    cfg: Config
    model: nn.Module
    classes: list[str]
    palette: list[list[int]]

    @property
    def index(self) -> int:
        """Number of the stage, from its folder's name."""
        return int(self.folder.resolve().name.removeprefix('stage_'))

    def preprocess(self, sample: dict[str, Any]) -> dict[str, Any]:
        """One packed sample as the batch that the model takes, normalised and on its device."""
        return self.model.data_preprocessor(pseudo_collate([copy.deepcopy(sample)]), False)

    @torch.no_grad()
    def predict(self, sample: dict[str, Any]) -> Tensor:
        """The predicted channel of each pixel, (H, W) long on the CPU, at the labels' size."""
        result = self.model.test_step(pseudo_collate([copy.deepcopy(sample)]))[0]
        return result.pred_sem_seg.data[0].cpu().long()


def load_stage(folder: str | Path, device: str | None = None) -> StageModel:
    """Reads ``config.py`` and ``snapshot.pth`` of a stage; nothing else of the run is needed.

    Args:
        folder: a run's ``stage_k``; it may have been moved.
        device: where the model runs; by default the GPU, if there is one.

    Raises:
        FileNotFoundError: the folder lacks one of the two.
        ValueError: the snapshot is no checkpoint, or lacks tensors of the model; a module that the config names
            is not found or cannot be imported.
    """
    folder = Path(folder)
    for name in ('config.py', 'snapshot.pth'):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f'{folder / name} does not exist: expected the folder of a finished stage, stage_k'
            )
    cfg = read_file(folder / 'config.py')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model_cfg = copy.deepcopy(cfg.model)
    if model_cfg.get('old_model') is not None:
        model_cfg.old_model = None  # nothing is trained
    model_cfg.backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(model_cfg))
    snapshot = load_checkpoint_safely(folder / 'snapshot.pth')
    missing = [key for key in model.state_dict() if key not in snapshot['state_dict']]
    if missing:
        raise ValueError(f'{folder / "snapshot.pth"} lacks {missing[:5]} of the model in config.py')
    model.load_state_dict(snapshot['state_dict'])
    meta = snapshot['meta']['dataset_meta']
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    return StageModel(
        folder, cfg, model.to(device).eval(), list(meta['classes']), list(meta['palette'])
    )


def stage_palette(folder: Path) -> dict[str, list[int]]:
    """The classes' colours by name out of a stage's snapshot; empty where there is none."""
    path = folder / 'snapshot.pth'
    if not path.is_file():
        return {}
    meta = load_checkpoint_safely(path)['meta'].get('dataset_meta', {})
    return dict(zip(meta.get('classes', ()), meta.get('palette', ()), strict=True))


def previous_stage(folder: str | Path) -> Path:
    """The folder of the stage before, beside it.

    Raises:
        ValueError: stage 0 has no old model, or the folder is no ``stage_k``.
    """
    folder = Path(folder).resolve()
    number = folder.name.removeprefix('stage_')
    if not number.isdigit() or folder.name == number:
        raise ValueError(f'{folder}: expected the folder of a stage, stage_1 or later')
    if number == '0':
        raise ValueError(f'{folder}: stage 0 has no old model; expected stage_1 or later')
    return folder.parent / f'stage_{int(number) - 1}'


def load_sample(stage: StageModel, image: str | Path) -> dict[str, Any]:
    """An image file as the stage's test pipeline packs it, without labels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not an image.
    """
    if not Path(image).is_file():
        raise FileNotFoundError(f'image {image} does not exist')
    steps = [step for step in stage.cfg.test_pipeline if step['type'] != 'LoadAnnotations']
    try:
        return Compose(steps)(dict(img_path=str(image)))
    except (OSError, AttributeError, AssertionError, cv2.error) as error:
        raise ValueError(f'{image} cannot be read as an image: {error}') from error


def mask_channels(stage: StageModel, mask: str | Path) -> Tensor:
    """An annotation file's labels as the stage's channels, (H, W) long.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a single-channel 8-bit image.
    """
    seg = read_labels(str(mask))
    dataset = DATASETS.build(dict(copy.deepcopy(stage.cfg.test_dataloader.dataset), lazy_init=True))
    return torch.from_numpy(dataset.mask_table[seg.astype(np.uint8)]).long()


def eval_dataset(cfg: Config) -> Any:
    """The stage's evaluation data, as its config names it."""
    return DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))
