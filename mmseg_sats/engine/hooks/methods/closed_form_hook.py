# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Computes a stage's classifier in one pass over its images instead of training it (C-RLS)."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.engine.hooks.methods.image_pass import images_seen_once
from mmseg_sats.functional.features.ridge import ridge_rows, ridge_sums
from mmseg_sats.models.heads.closed_form import ClosedFormClassifier
from mmseg_sats.models.padding import labels_of_batch, with_padding, without_padding
from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.segmentors.old_model import run_segmentor
from mmseg_sats.protocol import Stage
from mmseg_sats.utils.checkpoint import read_arrays, write_arrays

SUMS = 'closed_form.npz'


@HOOKS.register_module()
class ClosedFormHook(Hook):
    """Fits the closed-form classifier of the decode head to all images so far, and trains stage 0 alone.

    C-RLS of CFSSeg (SegACIL), ACM MM 2025. At the end of every stage its images are seen once, without augmentation.
    The sums ``E^T E`` and ``Y^T E`` over their pixels, E the expanded features and Y the one-hot labels, are added to
    those of the earlier stages, and the ridge regression of all of them gives the rows of all classes. Since nothing
    else is trained after stage 0, the result does not depend on how the images were divided into stages where their
    labels do not either. The sums are kept in ``closed_form.npz`` beside the snapshot.

    In later stages the segmentor's ``pseudo_labeler`` completes the labels, by the scores that the model has so far.

    The decode head needs the option ``closed_form`` of ``IncrementalEncoderDecoder``.

    Args:
        gamma: the weight of ``|W|^2``, above 0.
        stride: pixels of the image from one position to the next that is used, in each direction; where the features'
            positions are further apart, all are used. The paper's network has one position every 16 pixels.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, gamma: float = 1.0, stride: int = 16) -> None:
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not gamma > 0:
            raise ValueError(f'ClosedFormHook: gamma={gamma!r}, expected a number above 0')
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise ValueError(f'ClosedFormHook: stride={stride!r}, expected a whole number from 1')
        self.gamma = gamma
        self.stride = stride

    def before_run(self, runner: Runner) -> None:
        """Refuses models and options that do not go with it, before anything is trained.

        Raises:
            ValueError: there is no closed-form classifier, something is replayed, or the labeler needs a student.
        """
        model = unwrap(runner.model)
        if not isinstance(getattr(model.decode_head, 'conv_seg', None), ClosedFormClassifier):
            raise ValueError('ClosedFormHook: expected model.closed_form=dict(width=...), which the model lacks')
        for key in ('memory', 'outside_dataset'):
            if runner.cfg.get(key):
                raise ValueError(
                    f'ClosedFormHook: {key}={runner.cfg[key]!r}, expected none: nothing is trained that could replay '
                    'images, and the sums hold all images already'
                )
        labeler = model.pseudo_labeler
        if labeler is not None and flag(labeler, 'needs_student', PseudoLabeler):
            raise ValueError(f'ClosedFormHook: {type(labeler).__name__} needs a student, and there is only one model')

    def before_train(self, runner: Runner) -> None:
        """Ends the training of a later stage before its first iteration."""
        if runner.cfg.model.get('old_model'):
            runner.train_loop.stop_training = True

    @torch.no_grad()
    def before_snapshot(self, runner: Runner, stage: Stage) -> None:
        """Makes the pass, adds up and writes the sums, and computes the classifier."""
        start = time.perf_counter()
        model = unwrap(runner.model).eval()
        classifier = model.decode_head.conv_seg
        gram, cross = self._sums(runner, model, stage)
        for total in (gram, cross):
            all_reduce(total)  # once at the end, since ranks may differ by one image
        if stage.old:
            # A class that no image has shown yet may have no row there.
            before = _read(Path(runner.start_from).with_name(SUMS), gram.shape[0], stage.num_old)
            gram += before[0].to(gram)
            cross[: len(before[1])] += before[1].to(cross)
        if is_main_process():
            write_arrays(Path(runner.work_dir) / SUMS, gram=gram.cpu().numpy(), cross=cross.cpu().numpy())
        classifier.set_rows(ridge_rows(gram, cross, self.gamma))
        seconds = time.perf_counter() - start
        runner.message_hub.update_scalar('train/time', seconds)  # it is this stage's training
        runner.logger.info(f'classifier of {stage.num_channels} channels computed in {seconds:.1f} s')

    def _sums(self, runner: Runner, model: nn.Module, stage: Stage) -> tuple[Tensor, Tensor]:
        """The sums over the stage's images, or over this rank's part of them."""
        classifier = model.decode_head.conv_seg
        device, width = classifier.expansion.device, len(classifier.expansion)
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        cross = torch.zeros(stage.num_channels, width, dtype=torch.float64, device=device)
        for batch in images_seen_once(runner, 'the closed-form classifier'):
            features, labels, height = _features_and_labels(model, batch, stage)
            labels = F.interpolate(labels[:, None].double(), features.shape[2:], mode='nearest')[:, 0].long()
            step = max(1, round(self.stride * features.shape[2] / height))
            features, labels = (maps[..., ::step, ::step] for maps in (features, labels))
            pixels = classifier.expand(features).movedim(1, -1).flatten(0, 2)
            for total, part in zip((gram, cross), ridge_sums(pixels, labels.flatten(), len(cross)), strict=True):
                total += part
        return gram, cross


def _features_and_labels(model: nn.Module, batch: dict[str, Any], stage: Stage) -> tuple[Tensor, Tensor, int]:
    """The classifier's input, the completed labels (B, H, W) of the padded images, and the height of these."""
    data = model.data_preprocessor(batch, False)
    inputs, samples = data['inputs'], data['data_samples']
    labels = labels_of_batch(samples).to(inputs.device)
    output, _ = run_segmentor(model, inputs, with_attention=False, with_classifier=True)
    if stage.old and model.pseudo_labeler is not None:
        # Until the new rows are computed, the model's old channels are the old model's.
        old = dataclasses.replace(output, logits=output.logits[:, : stage.num_old])
        old = without_padding(old, samples, inputs.shape[-2:])
        labels, _ = complete_labels(labels, samples, dict(stage=model.pseudo_labeler), None, old)
    return output.classifier.features, with_padding(labels, samples, inputs.shape[-2:]), inputs.shape[-2]


def _read(path: Path, width: int, num_old: int) -> tuple[Tensor, Tensor]:
    """The sums of the earlier stages, which must fit a classifier of this width."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the earlier stages' sums, which a stage with ClosedFormHook leaves beside its "
            'snapshot'
        )
    gram, cross = read_arrays(path, ('gram', 'cross'), 'the sums of a closed-form classifier').values()
    if gram.shape != (width, width) or cross.shape[1:] != (width,) or len(cross) > num_old:
        raise ValueError(
            f'{path} holds sums of {len(cross)} channels and width {len(gram)}, expected at most {num_old} channels '
            f'and width {width}'
        )
    return gram, cross
