# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmengine's Runner, reading checkpoints without running code out of them."""

from collections.abc import Callable
from typing import Any

from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from mmseg_sats.checkpoint import load_checkpoint_safely
from mmseg_sats.engine.snapshot import unwrap


@RUNNERS.register_module()
class StageRunner(Runner):
    """The Runner of a stage.

    mmengine's loader unpickles anything where the safe read fails, and its ``resume`` executes a
    config text that it finds in a checkpoint. This one does neither.
    """

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: list[tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        """Loads a local checkpoint into the model; see mmengine's ``Runner.load_checkpoint``.

        Args:
            filename: path of a local file.
            map_location: not used: tensors are read onto the CPU and copied where they belong.
            strict: whether keys must match exactly.
            revise_keys: (pattern, replacement) pairs for the names of the tensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is cut off, damaged, of another kind, or carries code.
        """
        checkpoint = load_checkpoint_safely(filename)
        checkpoint['meta'].pop('config', None)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        keys = [(r'^module.', '')] if revise_keys is None else revise_keys
        checkpoint = _load_checkpoint_to_model(
            unwrap(self.model), checkpoint, strict, revise_keys=keys
        )
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint
