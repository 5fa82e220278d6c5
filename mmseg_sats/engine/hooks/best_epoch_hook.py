# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Keeps the weights with the best validation score."""

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

BEST, SCORES = 'best.pth', 'held_out.json'


@HOOKS.register_module()
class BestEpochHook(Hook):
    """Keeps the weights of the epoch with the best validation score, which become the stage's snapshot.

    In the stage's work dir, ``best.pth`` holds the best weights so far (the averaged ones if EMA is used)
    and ``held_out.json`` the score of every epoch, in percent. Of epochs with equal scores, the first is kept. If a
    run is stopped between an epoch and the end of its validation, the validation is made when the run is
    resumed. In a stage that is counted in iterations, those that are validated take the place of epochs.

    Only weights are kept: other state, such as SDR's prototypes, is that of the last epoch.

    Args:
        metric: a key of ``IncrementalIoUMetric``'s result, of which higher is better.
    """

    priority = 'LOWEST'  # runs after EMA has swapped the weights back and after all other state is resumed

    def __init__(self, metric: str = 'mIoU_all') -> None:
        self.metric = metric
        self.scores: dict[str, float | None] = {}

    def before_train(self, runner: Runner) -> None:
        """Reads the scores of a resumed stage, and validates its last epoch if that was not done."""
        if not runner.iter:
            return
        path = Path(runner.work_dir) / SCORES
        if path.exists():
            self.scores = read_json(path)
        unit, done = _done(runner)
        ended = unit == 'iteration' or runner.iter == done * len(runner.train_dataloader)
        if done and ended and _is_validated(runner, done) and str(done) not in self.scores:
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
        unit, done = _done(runner)
        # After resuming from an older checkpoint an epoch is repeated; its better score and weights are kept.
        if best or str(done) not in self.scores:
            self.scores[str(done)] = number
        if is_main_process():
            write_json(Path(runner.work_dir) / SCORES, self.scores)
        runner.logger.info(
            f'{unit} {done}: {self.metric} {score:.2f} on the held-out images'
            f'{", the best so far" if best else ""}'
        )


def _done(runner: Runner) -> tuple[str, int]:
    """What the stage is counted in, and how many of them are done."""
    if getattr(runner.train_loop, 'by_iterations', False):
        return 'iteration', runner.iter
    return 'epoch', runner.epoch


def _is_validated(runner: Runner, done: int) -> bool:
    """Whether the training loop validates after the epoch or iteration that was finished last."""
    loop = runner.train_loop
    due = done % loop.val_interval == 0 or runner.iter == loop.max_iters
    return done >= loop.val_begin and due
