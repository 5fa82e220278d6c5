# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Evaluates a stage. Also handles a stage 0 for which there are no evaluation images."""

import math
from collections.abc import Mapping, Sequence

from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import DATASETS

from mmseg_sats.datasets.incremental_dataset import IncrementalDataset, NoImagesError


def evaluation_set(cfg: Config) -> IncrementalDataset:
    """Builds the stage's evaluation data lazily: its classes are known, its images are not listed yet.

    Args:
        cfg: a stage's config.
    """
    return DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))


def evaluate_stage(runner: Runner, may_be_empty: bool) -> dict[str, float]:
    """Runs the stage's test loop.

    Args:
        runner: the stage's runner, its weights loaded.
        may_be_empty: whether it is allowed that no evaluation image has a class of the stage. This is
            so for a stage 0 that is taken from a checkpoint, whose data may not be available.

    Returns:
        The metrics of ``IncrementalIoUMetric``; all percentages are NaN if there is no image.

    Raises:
        NoImagesError: there is no image, and ``may_be_empty`` is False.
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
    """Selects the results of ``IncrementalIoUMetric`` from those of an evaluation and removes its ``prefix``.

    Args:
        metrics: percent by key; may include the results of other metrics.

    Raises:
        KeyError: there are no results of ``IncrementalIoUMetric``.
    """
    first = next((key for key in metrics if key.endswith('mIoU_base')), None)
    if first is None:
        raise KeyError(f'the evaluation gave {sorted(metrics)}: expected IncrementalIoUMetric in it')
    prefix = first.removesuffix('mIoU_base')
    return {key.removeprefix(prefix): v for key, v in metrics.items() if key.startswith(prefix)}


def empty_metrics(classes: Sequence[str]) -> dict[str, float]:
    """What ``IncrementalIoUMetric`` would return for no image at all: NaN for every figure, over no class."""
    keys = ['mIoU_base', 'mIoU_new', 'mIoU_all', 'hIoU', 'mIoU', *(f'IoU.{name}' for name in classes)]
    return dict.fromkeys(keys, math.nan) | dict.fromkeys(['classes_base', 'classes_new', 'classes_all'], 0)
