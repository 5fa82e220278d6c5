# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Computes the pseudo-labeler's thresholds at the start of a stage."""

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.datasets.memory.replay import stage_dataset_cfg
from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.models.padding import without_padding
from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.models.segmentor_output import labelling_chunks
from mmseg_sats.models.segmentors.incremental_encoder_decoder import IncrementalEncoderDecoder
from mmseg_sats.utils.checkpoint import read_json, write_json


@HOOKS.register_module()
class PseudoLabelThresholdHook(Hook):
    """Runs the old model once over the stage's training images before training, to find the thresholds.

    The images go through the config's ``test_pipeline``, without augmentation, so that the thresholds
    depend only on the stage and are the same for any number of ranks. They are saved in
    ``pseudo_label_thresholds.json`` in the stage's work dir, from which a resumed run reads them.

    Args:
        file_name: name of the file with the thresholds.
    """

    def __init__(self, file_name: str = 'pseudo_label_thresholds.json') -> None:
        self.file_name = file_name

    def before_train(self, runner: Runner) -> None:
        """Sets the thresholds of the model's pseudo-labeler, if there is an old model and the labeler needs them."""
        model = unwrap(runner.model)
        labeler = getattr(model, 'pseudo_labeler', None)
        if labeler is None or model.old_model is None or not flag(labeler, 'needs_pass', PseudoLabeler):
            return
        path = Path(runner.work_dir) / self.file_name
        if path.exists():
            labeler.load_state_dict(read_json(path))
        else:
            self.find(runner, model)
            barrier()
            if is_main_process():
                write_json(path, labeler.state_dict())
        values = ', '.join(f'{value:.4g}' for value in labeler.thresholds.tolist())
        runner.logger.info(f'thresholds of the pseudo-labels, background first: {values}')

    @torch.no_grad()
    def find(self, runner: Runner, model: IncrementalEncoderDecoder) -> None:
        """Computes and sets the thresholds of the model's pseudo-labeler; only ``cfg`` of ``runner`` is used."""
        labeler = model.pseudo_labeler
        labeler.reset(model.old_model.model.num_classes)
        device = next(model.parameters()).device
        for batch in runner.build_dataloader(training_images_once(runner)):
            data = model.data_preprocessor(batch, False)
            labels = torch.stack(
                [sample.gt_sem_seg.data for sample in data['data_samples']]
            ).squeeze(1)
            # Unknown pixels count as background here, as they do in training.
            labels, _ = model.without_unknown(labels)
            inputs = data['inputs']
            output = model.old_model.on_test_images(inputs, model.test_cfg)
            output = without_padding(output, data['data_samples'], inputs.shape[-2:])
            labels = labels.to(device).long()
            for chunk, logits in labelling_chunks(labels, [output], range(len(labels))):
                labeler.update(chunk, *logits)
        all_reduce(labeler.histograms)
        labeler.compute()


def training_images_once(runner: Runner) -> dict[str, Any]:
    """The config of a loader of the stage's training images: each once, with the transforms of the evaluation."""
    # Only the stage's own images: exemplars keep their labels, and outside images have another labeler.
    dataset = copy.deepcopy(stage_dataset_cfg(runner.cfg.train_dataloader.dataset))
    dataset.pipeline = copy.deepcopy(runner.cfg.test_pipeline)
    train = runner.cfg.train_dataloader
    cfg = dict(
        dataset=dataset,
        batch_size=1,
        num_workers=train.get('num_workers', 0),
        sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    )
    if train.get('num_batch_per_epoch'):
        # mmengine then trains only on that many images, so only these are used here.
        cfg['num_batch_per_epoch'] = train.num_batch_per_epoch * train.batch_size
    return cfg
