# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Carries the averages of adaptive weights through a resumed run."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.models.segmentors.adaptive_weight import AdaptiveWeight

KEY = 'adaptive_weights'


@HOOKS.register_module()
class AdaptiveWeightHook(Hook):
    """Keeps the state of a model's adaptive weights in mmengine's checkpoints, under an additional key.

    Snapshots do not have it: a stage begins anew.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adds the weights' state to mmengine's checkpoint."""
        checkpoint[KEY] = {name: part.running_state() for name, part in _adaptive(runner).items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restores the weights' state when a run is resumed."""
        for name, part in _adaptive(runner).items():
            if name in checkpoint.get(KEY, {}):
                part.load_running_state(checkpoint[KEY][name])


def _adaptive(runner: Runner) -> dict[str, AdaptiveWeight]:
    parts = getattr(unwrap(runner.model), 'distillation', {}).items()
    return {name: part for name, part in parts if isinstance(part, AdaptiveWeight)}
