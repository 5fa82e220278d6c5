# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How good the pseudo-labels of a stage are, against the true labels of its training images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmseg_sats.engine.diagnosis.classifier_rows import NotMeasurableError
from mmseg_sats.engine.diagnosis.images import TrainingImages
from mmseg_sats.engine.hooks.methods.pseudo_label_threshold_hook import THRESHOLDS
from mmseg_sats.models.padding import without_padding
from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.segmentors.old_model import OldModel
from mmseg_sats.utils.checkpoint import read_json
from mmseg_sats.visualization.stage_model import StageModel


def stage_labeler(stage: StageModel) -> Any:
    """The pseudo-labeler of a stage with the thresholds that the stage was trained with.

    Raises:
        NotMeasurableError: there is none, its thresholds are not there, or it needs the model in training.
    """
    labeler = getattr(stage.model, 'pseudo_labeler', None)
    if labeler is None:
        raise NotMeasurableError('the method has no pseudo-labels')
    if flag(labeler, 'needs_student', PseudoLabeler):
        raise NotMeasurableError(f'{type(labeler).__name__} needs the model as it was in training')
    if flag(labeler, 'needs_pass', PseudoLabeler):
        path = stage.folder / THRESHOLDS
        if not path.is_file():
            raise NotMeasurableError(f'{path.parent.name}/{path.name} does not exist')
        labeler.load_state_dict(read_json(path))
    return labeler


@torch.no_grad()
def pseudo_label_quality(
    stage: StageModel, old: StageModel, images: TrainingImages, places: Iterable[int]
) -> dict[str, Any]:
    """Labels the background of training images as the stage did, without augmentation, and compares with the truth.

    Classes of later stages are background.

    Args:
        stage: the stage.
        old: the stage before.
        images: the stage's training images.
        places: which of them.

    Returns:
        ``ignored``, the share of the background pixels that are ignored, and by name of background and the old
        classes ``share``, how many of these pixels are labelled as the class, ``precision`` and ``recall``; percent,
        None where there is no pixel.

    Raises:
        NotMeasurableError: see :func:`stage_labeler`.
    """
    labeler, teacher = stage_labeler(stage), OldModel(old.model)
    num_old = len(old.classes)
    counts = torch.zeros(num_old, num_old + 1, dtype=torch.int64)
    for place in places:
        data = stage.preprocess(images.dataset[place])
        inputs, samples = data['inputs'], data['data_samples']
        true = samples[0].gt_sem_seg.data.long()
        given = images.stage_labels[true.cpu()].to(inputs.device)
        output = teacher.on_test_images(inputs, stage.model.test_cfg)
        output = without_padding(output, samples, inputs.shape[-2:])
        completed, _ = complete_labels(given, samples, dict(stage=labeler), None, output)
        counts += labelled_as(given, completed, true.to(given.device), num_old)
    return quality(counts, old.classes)


def labelled_as(given: Tensor, completed: Tensor, true: Tensor, num_old: int) -> Tensor:
    """Counts the background pixels of a stage's labels by their true class and their pseudo-label.

    Args:
        given: (B, H, W) the stage's labels; those of 0 count.
        completed: (B, H, W), with pseudo-labels.
        true: (B, H, W).
        num_old: K_o, background included.

    Returns:
        (K_o, K_o + 1) int64 on the CPU; the last column has the ignored pixels.
    """
    counted = (given == 0) & (true < num_old)
    column = completed[counted].long().clamp(max=num_old)
    cells = true[counted] * (num_old + 1) + column
    return torch.bincount(cells, minlength=num_old * (num_old + 1)).view(num_old, -1).cpu()


def quality(counts: Tensor, classes: list[str]) -> dict[str, Any]:
    """Share, precision and recall out of the counts of :func:`labelled_as`."""
    total, labelled, true = counts.sum(), counts.sum(0), counts.sum(1)
    return dict(
        ignored=_percent(labelled[-1], total),
        classes={
            name: dict(
                share=_percent(labelled[row], total),
                precision=_percent(counts[row, row], labelled[row]),
                recall=_percent(counts[row, row], true[row]),
            )
            for row, name in enumerate(classes)
        },
    )


def _percent(part: Tensor, whole: Tensor) -> float | None:
    return 100 * int(part) / int(whole) if int(whole) else None
