# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmengine's logger hook for distributed runs, in which only the main process may write test results."""

from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class OneRankLoggerHook(LoggerHook):
    """mmengine's ``LoggerHook``, but only the main process writes the file of test results instead of all at once."""

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Logs the results in the main process only."""
        if is_main_process():
            super().after_test_epoch(runner, metrics)
