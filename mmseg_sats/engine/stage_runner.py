# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmengine's Runner for one stage: safe checkpoints, and epochs no longer than the stage has images."""

from collections.abc import Callable
from typing import Any

from mmengine.dist import get_world_size
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch.utils.data import DataLoader

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

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """mmengine's, in which ``num_batch_per_epoch`` is a bound: a small stage has fewer batches.

        mmengine takes it for the number of batches that are there, and asks for images past the last.
        """
        if not isinstance(dataloader, DataLoader) and dataloader.get('num_batch_per_epoch'):
            dataset = dataloader['dataset']
            if isinstance(dataset, dict):
                dataset = DATASETS.build(dataset)
                dataset.full_init()
            images = dataloader['num_batch_per_epoch'] * dataloader['batch_size'] * get_world_size()
            bound = dict(num_batch_per_epoch=None) if images >= len(dataset) else {}
            dataloader = dict(dataloader, dataset=dataset, **bound)
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)
