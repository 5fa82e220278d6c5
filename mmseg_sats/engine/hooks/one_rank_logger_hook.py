# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmengine's logger hook for a run of several processes, of which one writes."""

from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class OneRankLoggerHook(LoggerHook):
    """mmengine's, whose file of test results all processes would write at the same time."""

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Logs the results, in the main process."""
        if is_main_process():
            super().after_test_epoch(runner, metrics)
