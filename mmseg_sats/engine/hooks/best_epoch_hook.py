# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Keeps the weights of the epoch with the best validation score."""

import math
from collections.abc import Mapping
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.engine.evaluation import own_metrics
from mmseg_sats.engine.files.snapshot import trained_weights
from mmseg_sats.utils.checkpoint import read_json, write_checkpoint, write_json

BEST = 'best.pth'


@HOOKS.register_module()
class BestEpochHook(Hook):
    """Keeps the weights of the epoch with the best validation score, which become the stage's snapshot.

    In the stage's work dir, ``best.pth`` holds the best weights so far (the averaged ones if EMA is used)
    and ``held_out.json`` the score of every epoch. Of epochs with equal scores, the first is kept. If a
    run is stopped between an epoch and the end of its validation, the validation is made when the run is
    resumed.

    Only weights are kept: other state, such as SDR's prototypes, is that of the last epoch.

    Args:
        metric: a key of ``IncrementalIoUMetric``'s result, of which higher is better.
        file_name: name of the file with the scores, ``{epoch: percent}``.
    """

    priority = 'LOWEST'  # runs after EMA has swapped the weights back and after all other state is resumed

    def __init__(self, metric: str = 'mIoU_all', file_name: str = 'held_out.json') -> None:
        self.metric = metric
        self.file_name = file_name
        self.scores: dict[str, float | None] = {}

    def before_train(self, runner: Runner) -> None:
        """Reads the scores of a resumed stage, and validates its last epoch if that was not done."""
        path = Path(runner.work_dir) / self.file_name
        if runner.epoch and path.exists():
            self.scores = read_json(path)
        ended = runner.epoch and runner.iter == runner.epoch * len(runner.train_dataloader)
        if ended and _is_validated(runner) and str(runner.epoch) not in self.scores:
            runner.val_loop.run()

    def after_val_epoch(
        self, runner: Runner, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Records the epoch's score, and keeps its weights if it is the best."""
        score = own_metrics(metrics)[self.metric]
        number = None if math.isnan(score) else float(score)  # JSON has no NaN
        known = [value for value in self.scores.values() if value is not None]
        best = not known or (number is not None and number > max(known))
        if best:
            weights = trained_weights(runner)
            if is_main_process():
                write_checkpoint(Path(runner.work_dir) / BEST, weights)
        # After resuming from an older checkpoint an epoch is repeated; its better score and weights are kept.
        if best or str(runner.epoch) not in self.scores:
            self.scores[str(runner.epoch)] = number
        if is_main_process():
            write_json(Path(runner.work_dir) / self.file_name, self.scores)
        runner.logger.info(
            f'epoch {runner.epoch}: {self.metric} {score:.2f} on the held-out images'
            f'{", the best so far" if best else ""}'
        )


def _is_validated(runner: Runner) -> bool:
    """Whether mmengine's loop validates after the epoch that was finished last."""
    loop = runner.train_loop
    due = runner.epoch % loop.val_interval == 0 or runner.epoch == loop.max_epochs
    return runner.epoch >= loop.val_begin and due
