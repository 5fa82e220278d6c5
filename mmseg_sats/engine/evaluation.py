# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Evaluating a stage, also where there is nothing to evaluate it on."""

import math
from collections.abc import Mapping, Sequence

from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import DATASETS

from mmseg_sats.datasets.incremental_dataset import IncrementalDataset, NoImagesError


def evaluation_set(cfg: Config) -> IncrementalDataset:
    """The stage's evaluation data before its images are looked up: its classes, no list.

    Args:
        cfg: a stage's config.
    """
    return DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))


def evaluate_stage(runner: Runner, may_be_empty: bool) -> dict[str, float]:
    """Runs the stage's test loop.

    Args:
        runner: the stage's runner, its weights loaded.
        may_be_empty: whether evaluation images without a class of the stage are no error. So it is
            for a stage 0 that comes from a checkpoint: its data need not be at hand.

    Returns:
        The metrics of ``IncrementalIoUMetric``; NaN throughout where no image was left.

    Raises:
        NoImagesError: no image is left, and that is an error.
    """
    if may_be_empty:
        dataset = evaluation_set(runner.cfg)
        try:
            dataset.full_init()
        except NoImagesError as error:
            runner.logger.warning(f'stage {dataset.stage.index} is not evaluated: {error}')
            return empty_metrics(dataset.metainfo['classes'])
    return own_metrics(runner.test_loop.run())


def own_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """What ``IncrementalIoUMetric`` gave among the metrics of an evaluation, its ``prefix`` taken off.

    Args:
        metrics: percent by key, those of other metrics too.

    Raises:
        KeyError: it is not among them.
    """
    first = next((key for key in metrics if key.endswith('mIoU_base')), None)
    if first is None:
        raise KeyError(f'the evaluation gave {sorted(metrics)}: expected IncrementalIoUMetric in it')
    prefix = first.removesuffix('mIoU_base')
    return {key.removeprefix(prefix): v for key, v in metrics.items() if key.startswith(prefix)}


def empty_metrics(classes: Sequence[str]) -> dict[str, float]:
    """What ``IncrementalIoUMetric`` would return for no image at all: NaN for every figure."""
    keys = ['mIoU_base', 'mIoU_new', 'mIoU_all', 'hIoU', 'mIoU', *(f'IoU.{name}' for name in classes)]
    return dict.fromkeys(keys, math.nan)
