# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The diagnosis of a run: every stage with a snapshot is measured on images, and the figures are put into words."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_sats.datasets.incremental_dataset import IncrementalDataset, NoImagesError
from mmseg_sats.engine.diagnosis.classifier_rows import NotMeasurableError, classifier_rows
from mmseg_sats.engine.diagnosis.confusion import iou_by_class
from mmseg_sats.engine.diagnosis.images import TrainingImages, some, training_images
from mmseg_sats.engine.diagnosis.kept_attention import KeptAttention
from mmseg_sats.engine.diagnosis.oracle import fit_oracle, oracle_in_place
from mmseg_sats.engine.diagnosis.pseudo_labels import pseudo_label_quality
from mmseg_sats.engine.files.snapshot import check_classes, stage_folders, stage_number
from mmseg_sats.evaluation.incremental_iou import IncrementalIoUMetric
from mmseg_sats.visualization.stage_model import StageModel, eval_dataset, load_stage

Track = Callable[[Iterable[int], str], Iterable[int]]


def diagnose(
    work_dir: Path,
    only: int | None = None,
    images: int | None = None,
    device: str | None = None,
    track: Track = lambda places, _: places,
) -> Iterator[dict[str, Any]]:
    """Measures the stages of a run that have a snapshot, one after another.

    Args:
        work_dir: the run's.
        only: the stage to measure; by default all.
        images: how many images each pass uses at most, see :func:`some`; by default all.
        device: where the models run; by default the GPU, if there is one.
        track: shows the progress of a pass: gets the images and what the pass does, and yields the images.

    Yields:
        The figures of each stage: ``stage``, ``classes``, ``new_classes``, ``learned`` (the stage by class),
        ``images``, ``confusion`` (rows are labels, in pixels), ``iou``, ``unchanged`` (the IoU that stage 0's model has
        on the same images and classes; None in stage 0 and without its snapshot), ``classifier``, ``oracle``,
        ``attention`` and ``pseudo_labels``. Each of the last four is None if it could not be measured, and ``left_out``
        then has the reason by the same name. Of a stage without evaluation images, only ``stage`` and ``skipped``, the
        reason.

    Raises:
        FileNotFoundError: there is no such snapshot, or data of the evaluation are missing.
        ValueError: a snapshot does not fit its config or its data, or ``images`` is not 1 or more.
    """
    if images is not None and images < 1:
        raise ValueError(f'--images {images}: expected 1 or more')
    old: StageModel | None = None
    first: StageModel | None = None
    for folder in stage_folders(work_dir, only):
        before = folder.with_name(f'stage_{stage_number(folder) - 1}')
        if old is None and (before / 'snapshot.pth').is_file():
            old = load_stage(before, device)
        stage = load_stage(folder, device)
        if first is None and (folder.with_name('stage_0') / 'snapshot.pth').is_file():
            first = stage if stage.index == 0 else load_stage(folder.with_name('stage_0'), device)
        try:
            dataset = eval_dataset(stage.cfg)
        except NoImagesError as error:  # a stage 0 from a checkpoint, say
            yield dict(stage=stage.index, skipped=str(error))
        else:
            before = old if old and old.index == stage.index - 1 else None
            yield _measure(stage, before, first if stage.index else None, dataset, images, track)
        old = stage


def _measure(
    stage: StageModel,
    old: StageModel | None,
    first: StageModel | None,
    dataset: IncrementalDataset,
    number: int | None,
    track: Track,
) -> dict[str, Any]:
    classes, label = stage.classes, f'stage {stage.index}'
    check_classes(stage.folder, classes, dataset.metainfo['classes'])
    left_out: dict[str, str] = {}
    training = _part(left_out, ('oracle', 'pseudo_labels'), lambda: _training_images(stage, number))
    rows = training and _part(left_out, ('oracle',), lambda: fit_oracle(
        stage, training.dataset, track(training.seen, f'{label}: fitting the oracle')
    ))  # fmt: skip
    attention = _part(left_out, ('attention',), lambda: KeptAttention(_need(old), stage))
    confusion = np.zeros((3, len(classes), len(classes)), dtype=np.int64)
    places = some(dataset, range(len(dataset)), number)
    for place in track(places, f'{label}: evaluating'):
        sample = dataset[place]
        confusion[0] += _confusion(stage, sample, classes)
        if first is not None:
            confusion[2] += _confusion(first, sample, classes)
        if rows is not None:
            with oracle_in_place(stage.model.decode_head, rows):
                confusion[1] += _confusion(stage, sample, classes)
        if attention is not None:
            attention.add(sample)
    labelled = training and _part(left_out, ('pseudo_labels',), lambda: pseudo_label_quality(
        stage, _need(old), training, track(training.own, f'{label}: pseudo-labels')
    ))  # fmt: skip
    return dict(
        stage=stage.index,
        classes=classes,
        new_classes=classes[len(classes) - len(dataset.stage.new) :],
        learned={
            dataset.class_names[one]: earlier.index
            for earlier in dataset.protocol.stages[: stage.index + 1]
            for one in earlier.new
        },
        images=len(places),
        confusion=confusion[0].tolist(),
        iou=iou_by_class(confusion[0], classes),
        unchanged=first and iou_by_class(confusion[2], classes),
        classifier=_part(left_out, ('classifier',), lambda: classifier_rows(stage.model.decode_head, classes)),
        oracle=None if rows is None else dict(
            training_images=len(training.seen), iou=iou_by_class(confusion[1], classes)
        ),
        attention=attention and attention.by_class(),
        pseudo_labels=labelled and dict(labelled, training_images=len(training.own)),
        left_out=left_out,
    )  # fmt: skip


def _part(left_out: dict[str, str], names: Sequence[str], measure: Callable[[], Any]) -> Any:
    """What ``measure`` gives; or None, with the reason noted for the parts that need it."""
    try:
        return measure()
    except NotMeasurableError as error:
        left_out.update(dict.fromkeys(names, str(error)))
        return None


def _need(old: StageModel | None) -> StageModel:
    if old is None:
        raise NotMeasurableError('there is no snapshot of a stage before')
    return old


def _training_images(stage: StageModel, number: int | None) -> TrainingImages:
    try:
        found = training_images(stage.cfg, number)
        found.dataset[found.own[0]]  # the masks are there; now the images
    except (OSError, NoImagesError) as error:
        raise NotMeasurableError(f'the training data are not there: {error}') from error
    except RuntimeError as error:
        if isinstance(error.__cause__, OSError):
            raise NotMeasurableError(f'the training data are not there: {error.__cause__}') from error
        raise
    return found


def _confusion(model: StageModel, sample: dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    """(K, K) of a model that knows these classes, or the first of them."""
    label = sample['data_samples'].gt_sem_seg.data[0]
    return IncrementalIoUMetric.confusion(model.predict(sample), label, len(classes))
