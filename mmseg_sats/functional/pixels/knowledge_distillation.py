# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""LwF's distillation: the old model's probabilities as soft labels over the old channels.

Li and Hoiem, "Learning without Forgetting", ECCV 2016, eq. (2), at temperature 1. It is divided by the
number of old channels, as in the released codes of MiB and PLOP, which compare with LwF.
"""

from torch import Tensor

from mmseg_sats.functional.pixels.means import mean_over_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk


def knowledge_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """-(1/K_o) mean_pixels sum_c q_c log softmax(x[0:K_o])_c.

    x are the student's logits and q is the softmax of the old model's logits. The new channels are not
    used, not even in the denominator of the softmax, and get no gradient.

    Args:
        student_logits: (B, K, H, W), K >= K_o; the first K_o channels are those of the old model.
        teacher_logits: (B, K_o, H, W), the old model's logits, which get no gradient.

    Returns:
        The mean over all B*H*W pixels, a scalar of at least float32.

    Raises:
        ValueError: the sizes disagree, or the student has fewer channels than the old model.
    """
    return mean_over_pixels(knowledge_distillation_of_pixels, student_logits, teacher_logits)


def knowledge_distillation_of_pixels(chunk: PixelChunk) -> Tensor:
    """The loss of each pixel of a chunk, (n, w)."""
    log_p = chunk.student[:, : chunk.q.shape[1]].log_softmax(1)
    return -(chunk.q * log_p).mean(1)
