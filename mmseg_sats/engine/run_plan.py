# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The plan of a run: the images and iterations of every stage, computed before the stage is reached."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.dist import get_world_size
from mmseg.registry import DATASETS

from mmseg_sats.datasets import IncrementalDataset
from mmseg_sats.engine.config.stage_config import (
    build_stage_config,
)
from mmseg_sats.engine.config.variables import config_variables, resolve_variables
from mmseg_sats.protocol import Protocol


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Args:
        index: number of the stage.
        classes: names of the classes that it learns.
        images: number of its training images, without exemplars.
        iterations: number of its training iterations.
    """

    index: int
    classes: tuple[str, ...]
    images: int
    iterations: int


def find_incremental_dataset(dataset: Any) -> IncrementalDataset | None:
    """Finds the :class:`IncrementalDataset` inside a dataset that may be wrapped by others; None if there is none."""
    while not isinstance(dataset, IncrementalDataset):
        inner = [
            # mmengine's slice for num_batch_per_epoch forwards every other attribute, so vars() is needed.
            vars(dataset).get('_dataset'),
            getattr(dataset, 'dataset', None),
            *getattr(dataset, 'datasets', ()),
            *getattr(dataset, 'parts', {}).values(),
        ]
        dataset = next((item for item in inner if item is not None), None)
        if dataset is None:
            return None
    return dataset


def build_protocol(cfg: Config, loader: str = 'train_dataloader') -> Protocol:
    """The protocol of a run's config for the classes of its data set. No image is read.

    Args:
        cfg: the run's config.
        loader: whose data set is asked; some data sets want their list even so.

    Raises:
        ValueError: the protocol is impossible, or the data of several data sets are joined around their stages.
        KeyError: the config of the data uses a variable that is not defined.
    """
    variables = config_variables(cfg) | dict(stage=0)
    for part in ('train_dataloader', 'test_dataloader'):
        _check_order_of_wrappers(part, (cfg.get(part) or {}).get('dataset') or {})
    dataset = resolve_variables(cfg[loader].dataset.to_dict(), variables)
    return DATASETS.build(dict(dataset, lazy_init=True)).protocol


def _check_order_of_wrappers(part: str, dataset: Mapping[str, Any]) -> None:
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and issubclass(kind, ConcatDataset | RepeatDataset):
        raise ValueError(
            f'{part}.dataset is a {kind.__name__}, of which a stage cannot be made: expected IncrementalDataset around '
            f"it, such as train_dataset=dict(type='{kind.__name__}', ...) in our configs"
        )


def plan_run(
    cfg: Config, dataset: IncrementalDataset, work_dir: Path
) -> list[StagePlan]:
    """The stages of a run.

    Args:
        cfg: the run's config.
        dataset: the training images of any one of its stages.
        work_dir: the run's work dir.
    """
    plans = []
    for stage in dataset.protocol.stages:
        images = len(dataset.rows_of(stage))
        stage_cfg = build_stage_config(cfg, dataset.protocol, stage, work_dir)
        classes = tuple(dataset.class_names[c] for c in stage.new)
        plans.append(StagePlan(stage.index, classes, images, _iterations(stage_cfg, images)))
    return plans


def _iterations(cfg: Config, images: int) -> int:
    if cfg.train_cfg.get('max_iters'):
        return cfg.train_cfg.max_iters
    loader = cfg.train_dataloader
    batches = math.ceil(images / (loader.batch_size * get_world_size()))
    if loader.get('num_batch_per_epoch'):
        batches = min(batches, loader.num_batch_per_epoch)
    return cfg.train_cfg.max_epochs * batches


def time_left(
    plans: Sequence[StagePlan], index: int, done: int, total: int, pace: float
) -> tuple[float, float]:
    """Seconds of training left for the stage and, at the same speed, for the run.

    Args:
        plans: all stages; if empty, the run is taken to be this stage alone.
        index: the current stage.
        done: how many of its iterations are done.
        total: how many iterations it has.
        pace: seconds per iteration.
    """
    stage = pace * (total - done)
    return stage, stage + pace * sum(plan.iterations for plan in plans if plan.index > index)
