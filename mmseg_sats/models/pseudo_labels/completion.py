# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Completes the labels of a batch. Which labeler an image gets depends on the image's source."""

from collections.abc import Callable, Mapping, Sequence

from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.models.segmentor_output import SegmentorOutput, labelling_chunks


def complete_labels(
    labels: Tensor,
    data_samples: Sequence[SegDataSample],
    labelers: Mapping[str, Callable[..., Tensor]],
    student: SegmentorOutput | None,
    teacher: SegmentorOutput,
) -> tuple[Tensor, Tensor | None]:
    """Applies each labeler to the labels of the images of its source.

    Args:
        labels: (B, H, W) long; not modified.
        data_samples: the B samples. ``source`` in their metainfo is the source of an image; without it,
            the image is one of the stage's own (``'stage'``).
        labelers: source to a :class:`PseudoLabeler`, or to an object that is called in the same way. It
            gets all images of its source at once or, if its ``pixelwise`` is True, chunk by chunk (rows or
            whole images). The student's logits have no gradients.
        student: the student's output for the batch; may be None if no labeler needs it.
        teacher: the old model's output for the batch.

    Returns:
        The completed labels, a new tensor, or ``labels`` itself if no image has a labeler. And the
        images' weights in the segmentation loss, (B,), 1 for images whose labeler returns no weights;
        None if no labeler returns weights.
    """
    sources = [sample.metainfo.get('source', 'stage') for sample in data_samples]
    size = labels.shape[-2:]
    completed, weights = labels, None
    for source, labeler in labelers.items():
        rows = [row for row, name in enumerate(sources) if name == source]
        if not rows:
            continue
        # Usually all images of a batch have the same source; a slice then avoids copies.
        at = slice(None) if len(rows) == len(sources) else rows
        models = [teacher, student] if flag(labeler, 'needs_student', PseudoLabeler) else [teacher]
        completed = completed.clone()
        if flag(labeler, 'pixelwise', PseudoLabeler):
            for chunk, logits in labelling_chunks(completed, models, rows):
                chunk.copy_(labeler(chunk, *logits))
        else:
            logits = [model.labelling_logits(size).detach()[at] for model in models]
            completed[at] = labeler(labels[at], *logits)
        weigh = getattr(labeler, 'image_weights', None)
        own_weights = weigh(labels[at], completed[at]) if weigh else None
        if own_weights is not None:
            weights = own_weights.new_ones(len(labels)) if weights is None else weights
            weights[at] = own_weights
    return completed, weights
