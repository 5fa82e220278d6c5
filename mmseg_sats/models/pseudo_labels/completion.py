# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which part labels which image of a batch: by where the image comes from."""

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
    """The labels after each labeler has seen the images of its source, and no others.

    Args:
        labels: (B, H, W) long; left as they are.
        data_samples: the B samples; ``source`` in their metainfo says where they come from, the
            stage's own images (``'stage'``) where it does not.
        labelers: source to a :class:`PseudoLabeler`, or to anything that is called like one. It gets
            the b images of its source, or, where it has a true ``pixelwise``, a chunk of their pixels
            at a time, rows or whole images; the student's logits come without gradients.
        student: the student's output for the batch; None will do where no labeler needs it.
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
