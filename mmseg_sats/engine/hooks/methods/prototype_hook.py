# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Carries the classes' prototypes from stage to stage, and through a resumed run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.datasets.incremental_dataset import NoImagesError
from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.engine.hooks.methods.image_pass import images_seen_once
from mmseg_sats.models.padding import labels_of_batch, with_padding
from mmseg_sats.models.prototypes import ClassPrototypes, ReplayPrototypes
from mmseg_sats.utils.checkpoint import read_arrays, write_arrays

KEY = 'prototypes'
FILE = 'prototypes.npz'
Prototypes = ClassPrototypes | ReplayPrototypes


@HOOKS.register_module()
class PrototypeHook(Hook):
    """Saves a model's prototypes in a file beside its snapshots, which stay ordinary mmseg checkpoints.

    A stage starts with the prototypes that the previous stage saved in ``prototypes.npz`` beside its
    snapshot, and saves its own in the same way. mmengine's checkpoints contain them under an additional
    key, for resuming. A stage 0 that was taken from a checkpoint has no :class:`ClassPrototypes`, so they are computed
    in one pass of its model over the stage's training images.

    :class:`ReplayPrototypes` are always computed so, of the weights that are kept, when a stage has ended. When a later
    stage begins, the old model sees its images once, to count the old classes in them.

    Does nothing for a model without prototypes.
    """

    def __init__(self) -> None:
        self._begun = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Adds the prototypes to mmengine's checkpoint."""
        prototypes = self._prototypes(runner)
        if prototypes is not None:
            checkpoint[KEY] = prototypes.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restores the prototypes when a run is resumed."""
        prototypes = self._prototypes(runner)
        if prototypes is not None and KEY in checkpoint:
            prototypes.load_state_dict(checkpoint[KEY])
            self._begun = True

    def before_train(self, runner: Runner) -> None:
        """Starts from the previous stage's prototypes, unless the run is resumed."""
        self._begin(runner)

    def _begin(self, runner: Runner) -> None:
        prototypes = self._prototypes(runner)
        old_model = runner.cfg.model.get('old_model')
        if prototypes is None or self._begun or not old_model:
            return
        self._begun = True
        path = Path(old_model.checkpoint).parent / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: the previous stage's prototypes, which a stage with "
                'PrototypeHook leaves beside its snapshot'
            )
        prototypes.load_state_dict(read_arrays(path, prototypes.names, 'prototypes'))
        if isinstance(prototypes, ReplayPrototypes):
            old = unwrap(runner.model).old_model
            prototypes.present = _over_images(
                runner, lambda inputs, labels: prototypes.present_in(labels, old(inputs).logits)
            )

    def after_train(self, runner: Runner) -> None:
        """Saves prototypes that grow in training for the next stage."""
        prototypes = self._prototypes(runner)
        if prototypes is not None and prototypes.grows_in_training:
            self._write(runner, prototypes)

    def after_stage(self, runner: Runner, stage: object, metrics: dict) -> None:
        """Computes the prototypes of a stage that was not trained, and those that do not grow in training."""
        prototypes = self._prototypes(runner)
        if prototypes is not None and not (Path(runner.work_dir) / FILE).exists():
            self._begin(runner)  # a run that was resumed behind the training has not begun
            self._gather(runner, prototypes)
            self._write(runner, prototypes)

    def _gather(self, runner: Runner, prototypes: Prototypes) -> None:
        model = unwrap(runner.model).eval()
        try:
            total = _over_images(
                runner, lambda inputs, labels: prototypes.sums_of(prototypes.features_of(model, inputs), labels)
            )
        except NoImagesError as error:
            raise NoImagesError(
                'model.prototypes are means over the training images of a stage, also of a stage 0 that is not '
                f'trained: {error}; expected images that show its classes, or a method without prototypes'
            ) from None
        prototypes.add(total)
        runner.logger.info('prototypes gathered in one pass over the training images')

    def _write(self, runner: Runner, prototypes: Prototypes) -> None:
        if is_main_process():
            arrays = {name: value.numpy() for name, value in prototypes.state_dict().items()}
            write_arrays(Path(runner.work_dir) / FILE, **arrays)

    @staticmethod
    def _prototypes(runner: Runner) -> Prototypes | None:
        return getattr(unwrap(runner.model), 'prototypes', None)


@torch.no_grad()
def _over_images(runner: Runner, of_batch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The sum of ``of_batch(inputs, labels)`` over the stage's training images, without augmentation, on the CPU."""
    model, total = unwrap(runner.model), None
    for batch in images_seen_once(runner, "the classes' prototypes"):
        data = model.data_preprocessor(batch, False)
        inputs, samples = data['inputs'], data['data_samples']
        batch_total = of_batch(inputs, with_padding(labels_of_batch(samples), samples, inputs.shape[-2:]))
        total = batch_total if total is None else total + batch_total
    # Once at the end, not per batch, since ranks may differ by one image. One without any does not know the size.
    parts = all_gather_object(None if total is None else total.cpu())
    return sum(part for part in parts if part is not None)
