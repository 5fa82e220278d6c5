# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""mmengine's Runner for one stage: it reads checkpoints safely and never asks for more images than there are."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from mmengine.dist import get_world_size
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmengine.utils.dl_utils import collect_env
from torch.utils.data import DataLoader

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.protocol import Stage
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

# How mmengine's messages of hundreds of lines begin, and its warnings about itself.
_FOR_THE_FILE = (
    'System environment:', 'Runtime environment:', 'Config:', 'Hooks will be executed',
    'paramwise_options',
)  # fmt: skip
_ABOUT_ITSELF = (
    '"FileClient" will be deprecated', '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
)  # fmt: skip
collect_environment = cache(collect_env)


@RUNNERS.register_module()
class StageRunner(Runner):
    """The Runner of a stage.

    mmengine's loader unpickles anything where the safe read fails, and its ``resume`` executes a
    config text that it finds in a checkpoint. This one does neither.

    Long messages at the start of a stage (environment, config, order of the hooks, options by
    parameter), and mmengine's warnings about its own calls, only go to the log file.

    Attributes:
        stage: the stage of the run, for which hooks are called at its borders; None where the stage's
            config is run on its own.
        start_from: path of the weights that the stage starts from, also where it is resumed; None
            for those that the model is initialised with.
    """

    stage: Stage | None = None
    start_from: str | None = None

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        """mmengine's logger, without these messages on the screen."""
        logger = super().build_logger(*args, **options)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:  # a FileHandler is one too
                handler.addFilter(_for_the_screen)
        return logger

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Logs environment and config, without starting compilers at every stage as mmengine does."""
        run = dict(
            env_cfg,
            **(self._randomness_cfg | dict(seed=self.seed)),
            launcher=self._launcher,
            processes=self._world_size,
        )
        for name, values in (('System', collect_environment()), ('Runtime', run)):
            lines = [f'{name} environment:', *(f'{key}: {value}' for key, value in values.items())]
            self.logger.info('\n    '.join(lines))
        self.logger.info(f'Config:\n{self.cfg.pretty_text}')

    def load_or_resume(self) -> None:
        """Loads the weights that the stage starts from and calls ``before_stage``, then resumes, if asked to.

        On a resume, too, a hook sees the weights of the start: those of the checkpoint replace them behind it.
        """
        if self._has_loaded or self.stage is None:
            super().load_or_resume()
            return
        resume, checkpoint = self._resume, self._load_from
        self._resume, self._load_from = False, self.start_from
        super().load_or_resume()
        self.call_hook('before_stage', stage=self.stage)
        self._resume, self._load_from, self._has_loaded = resume, checkpoint, not resume
        super().load_or_resume()
        if resume:
            # A fresh stage reads the old model in its first iteration at the latest, which draws random numbers
            # there. Read in the iteration that a resumed stage goes on with, it would change that one's.
            _ = getattr(unwrap(self.model), 'old_model', None)

    def start(self) -> None:
        """Brings a stage that has nothing left to train to where its training would begin."""
        self._init_model_weights()
        self._resume = False
        self.load_or_resume()

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

        mmengine takes it as the exact number of batches, and asks for images that do not exist.
        """
        if not isinstance(dataloader, DataLoader) and dataloader.get('num_batch_per_epoch'):
            dataset = dataloader['dataset']
            if isinstance(dataset, dict):
                dataset = DATASETS.build(dataset)
                dataset.full_init()
            images = dataloader['num_batch_per_epoch'] * dataloader['batch_size'] * get_world_size()
            if images >= len(dataset):
                dataloader = dict(dataloader, num_batch_per_epoch=None)
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)


def _for_the_screen(record: logging.LogRecord) -> bool:
    begins = record.getMessage().startswith
    if record.levelno <= logging.INFO:
        return not begins(_FOR_THE_FILE)
    return not begins(_ABOUT_ITSELF)
