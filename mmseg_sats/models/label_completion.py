# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which part labels which image of a batch: by where the image comes from."""

from collections.abc import Callable, Mapping, Sequence

from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_sats.models.output import SegmentorOutput


def complete_labels(
    labels: Tensor,
    data_samples: Sequence[SegDataSample],
    labelers: Mapping[str, Callable[..., Tensor]],
    student: SegmentorOutput,
    teacher: SegmentorOutput,
) -> tuple[Tensor, Tensor | None]:
    """The labels after each labeler has seen the images of its source, and no others.

    Args:
        labels: (B, H, W) long; left as they are.
        data_samples: the B samples; ``source`` in their metainfo says where they come from, the
            stage's own images (``'stage'``) where it does not.
        labelers: source to an object called as ``labeler(labels, teacher_logits)`` with (b, H, W)
            and (b, K_old, H, W), or, where it has a true ``needs_student``, as ``labeler(labels,
            teacher_logits, student_logits)`` with (b, K, H, W) without gradients. Its
            ``image_weights(labels, completed)``, if any, gives (b,) or None.
        student: the student's output for the batch.
        teacher: the old model's.

    Returns:
        ``labels`` themselves where no labeler has an image, else a new tensor like them; and the
        images' weights in the segmentation loss, (B,), 1 where a labeler has no say, or None where
        none of them has.
    """
    sources = [sample.metainfo.get('source', 'stage') for sample in data_samples]
    size = labels.shape[-2:]
    completed, weights = labels, None
    for source, labeler in labelers.items():
        rows = [row for row, name in enumerate(sources) if name == source]
        if not rows:
            continue
        # The usual batch is of one source: no copies.
        at = slice(None) if len(rows) == len(sources) else rows
        logits = [teacher.labelling_logits(size)[at]]
        if getattr(labeler, 'needs_student', False):
            logits.append(student.labelling_logits(size).detach()[at])
        own = labeler(labels[at], *logits)
        completed = completed.clone()
        completed[at] = own
        weigh = getattr(labeler, 'image_weights', None)
        own_weights = weigh(labels[at], own) if weigh else None
        if own_weights is not None:
            weights = own_weights.new_ones(len(labels)) if weights is None else weights
            weights[at] = own_weights
    return completed, weights
