# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The images that a run is diagnosed with, of the evaluation and of the training, with their true labels."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS
from torch import Tensor

from mmseg_sats.datasets.incremental_dataset import IncrementalDataset
from mmseg_sats.datasets.memory.replay import stage_dataset_cfg


@dataclass(eq=False)
class TrainingImages:
    """The images that the stages have been trained with so far, with the true labels of all seen classes.

    Args:
        dataset: all training images with these labels, by channel; classes of later stages are background.
        seen: which of them the stages up to this one show, without repetition.
        own: which of them this stage shows.
        stage_labels: (256,) what each channel is in the labels that this stage was trained with.
    """

    dataset: IncrementalDataset
    seen: list[int]
    own: list[int]
    stage_labels: Tensor


def training_images(cfg: Config, number: int | None = None) -> TrainingImages:
    """The training images of a stage and of those before it, each once, with the transforms of the evaluation.

    Args:
        cfg: the stage's config.
        number: how many images at most, see :func:`some`; None takes all.

    Raises:
        FileNotFoundError: there is no training data, or a file of it is missing.
        NoImagesError: the stage has no image.
    """
    if not cfg.get('train_dataloader'):
        raise FileNotFoundError("the stage's config names no training data")
    own = copy.deepcopy(stage_dataset_cfg(cfg.train_dataloader.dataset))
    own.pipeline = copy.deepcopy(cfg.test_pipeline)
    trained = DATASETS.build(own)
    # As if they were evaluated: then all seen classes have their labels.
    true = dict(mode='eval', eval_images='all', eval_future='background', held_out=None, label_transforms=())
    shown = DATASETS.build(dict(own, **true))
    stages = trained.protocol.stages[: trained.stage.index + 1]
    rows = [trained.rows_of(stage) for stage in stages]
    seen, new = (np.searchsorted(shown.indices, np.unique(part)).tolist() for part in (np.concatenate(rows), rows[-1]))
    labels = torch.full((256,), trained.ignore_index)
    known = [0, *trained.stage.seen]
    labels[torch.from_numpy(shown.table[known]).long()] = torch.from_numpy(trained.table[known]).long()
    return TrainingImages(shown, some(shown, seen, number), some(shown, new, number), labels)


def some(dataset: IncrementalDataset, places: Sequence[int], number: int | None) -> list[int]:
    """At most ``number`` images, chosen by a hash of their names, in the order of the data set.

    So the choice is always the same, and of two sets, one inside the other, most images are chosen from both.

    Args:
        dataset: that holds them.
        places: those to choose from.
        number: how many; None chooses all.
    """
    if number is None or number >= len(places):
        return list(places)
    names = dataset.image_names()
    return sorted(sorted(places, key=lambda place: hashlib.sha256(names[place].encode()).digest())[:number])
