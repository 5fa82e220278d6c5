# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Computes the pseudo-labeler's thresholds at the start of a stage."""

from pathlib import Path

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.engine.hooks.methods.image_pass import images_seen_once
from mmseg_sats.models.padding import labels_of_batch, without_padding
from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.models.segmentor_output import labelling_chunks
from mmseg_sats.models.segmentors.incremental_encoder_decoder import IncrementalEncoderDecoder
from mmseg_sats.utils.checkpoint import read_json, write_json

THRESHOLDS = 'pseudo_label_thresholds.json'


@HOOKS.register_module()
class PseudoLabelThresholdHook(Hook):
    """Runs the old model once over the stage's training images before training, to find the thresholds.

    The images go through the config's ``test_pipeline``, without augmentation, so that the thresholds
    depend only on the stage and are the same for any number of ranks. They are saved in
    ``pseudo_label_thresholds.json`` in the stage's work dir, from which a resumed run reads them.
    """

    def before_train(self, runner: Runner) -> None:
        """Sets the thresholds of the model's pseudo-labeler, if there is an old model and the labeler needs them."""
        model = unwrap(runner.model)
        labeler = getattr(model, 'pseudo_labeler', None)
        if labeler is None or model.old_model is None or not flag(labeler, 'needs_pass', PseudoLabeler):
            return
        path = Path(runner.work_dir) / THRESHOLDS
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
        for batch in images_seen_once(runner, "the pseudo-labels' thresholds"):
            data = model.data_preprocessor(batch, False)
            # Unknown pixels count as background here, as they do in training.
            labels, _ = model.without_unknown(labels_of_batch(data['data_samples']))
            inputs = data['inputs']
            output = model.old_model.on_test_images(inputs, model.test_cfg)
            output = without_padding(output, data['data_samples'], inputs.shape[-2:])
            labels = labels.to(device)
            for chunk, logits in labelling_chunks(labels, [output], range(len(labels))):
                labeler.update(chunk, *logits)
        all_reduce(labeler.histograms)
        labeler.compute()
