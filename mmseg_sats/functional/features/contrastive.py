# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""UCD's distillation: pixels of one class attract each other in the features of the new and of the old model.

Yang et al., "Uncertainty-aware Contrastive Distillation for Incremental Semantic Segmentation", TPAMI 2022, in
the form of their released code (the second version there).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_sats.functional.over_ranks import gather_over_ranks, sum_over_ranks
from mmseg_sats.functional.precision import full_precision, working_dtype


def contrastive_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, probabilities: Tensor, temperature: float = 0.07
) -> Tensor:
    """-mean_i 1/|P_i| sum_{j in P_i} w_ij log(e_ij / (e_ij + sum_{k: y_k != y_i} e_ik)), e_ij = exp(f_i g_j / T).

    The anchors f_i are the pixels' features in the new model. They are compared with the features g_j of all pixels
    in the new model, and with those of the pixels of old classes in the old model; all are scaled to length 1, and
    the g_j get no gradient. P_i are the j of the same label, without the anchor itself. w_ij is the old model's
    probability that both pixels have the same class, sum_c q_ic q_jc, and 1 if the label is a new class.
    Anchors that nothing has the label of are left out.

    Args:
        student: (n, C), the pixels' features in the new model.
        teacher: (n, C), those in the old model.
        labels: (n,) integers, of the same pixels; K_o or larger for new classes.
        probabilities: (n, K_o), the old model's probabilities q of the same pixels.
        temperature: T.

    Returns:
        The mean over the anchors, a scalar of at least float32; 0 if there are none. On several processes, the pixels
        are compared with those of all processes.

    Raises:
        ValueError: the shapes disagree.
    """
    number = len(labels)
    if student.dim() != 2 or student.shape != teacher.shape or len(student) != number or len(probabilities) != number:
        raise ValueError(
            'student and teacher must be (n, C), labels (n,) and probabilities (n, K_o), got '
            f'{[tuple(tensor.shape) for tensor in (student, teacher, labels, probabilities)]}'
        )
    num_old = probabilities.shape[1]
    dtype = working_dtype(student, teacher)
    with full_precision(student):
        new, old = (F.normalize(features.to(dtype), dim=1) for features in (student, teacher))
        own = torch.cat([new, old, probabilities.to(dtype), labels.to(dtype).unsqueeze(1)], 1).detach()
        everything, first = gather_over_ranks(own)
        all_new, all_old, q, y = everything.split([new.shape[1], old.shape[1], num_old, 1], 1)
        known = y[:, 0] < num_old  # the old model does not know the others
        scores = new @ torch.cat([all_new, all_old[known]]).mT / temperature
        weights = own[:, -1 - num_old : -1] @ torch.cat([q, q[known]]).mT
        weights = weights.masked_fill((labels >= num_old).unsqueeze(1), 1)
        same = labels.to(dtype).unsqueeze(1) == torch.cat([y, y[known]]).T
        others = scores.masked_fill(same, torch.finfo(dtype).min).logsumexp(1, keepdim=True)
        itself = torch.zeros_like(same)
        itself.diagonal(first)[:number] = True
        positive = same & ~itself
        terms = weights * (torch.logaddexp(scores, others) - scores)
        pairs = positive.sum(1)
        losses = terms.masked_fill(~positive, 0).sum(1) / pairs.clamp(min=1)
        total, anchors = sum_over_ranks(torch.stack([losses.sum(), (pairs > 0).sum().to(dtype)]))
    return total / anchors.clamp(min=1)
