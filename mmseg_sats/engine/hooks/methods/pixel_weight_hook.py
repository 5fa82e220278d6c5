# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Carries the counts of the weights of pixels through a resumed run."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.engine.files.snapshot import unwrap

KEY = 'pixel_weights'


@HOOKS.register_module()
class PixelWeightHook(Hook):
    """Keeps a model's ``pixel_weights`` in mmengine's checkpoints, under an additional key.

    A stage begins anew. Does nothing for a model without weights of pixels.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adds the state of the weights to mmengine's checkpoint."""
        weights = getattr(unwrap(runner.model), KEY, None)
        if weights is not None:
            checkpoint[KEY] = weights.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restores the state of the weights when a run is resumed."""
        weights = getattr(unwrap(runner.model), KEY, None)
        if weights is not None and KEY in checkpoint:
            weights.load_state_dict(checkpoint[KEY])
