# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Scales the classifier's rows of new classes to the length of those of old classes (weight aligning)."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.protocol import Stage


@HOOKS.register_module()
class ClassifierAligningHook(Hook):
    """Multiplies the rows of new classes by ``mean ||w_old|| / mean ||w_new||`` before a snapshot is written.

    Weight aligning (Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020,
    eq. (6) and (7)). The means are over the old and over the new foreground classes of each classifier of pixels,
    that is each convolution with a row for each class. Biases are left alone, as there; so is background, which the
    paper's task does not have and which every stage learns.
    """

    def before_snapshot(self, runner: Runner, stage: Stage) -> None:
        """Scales the rows of the weights that are about to be kept; nothing in stage 0."""
        if stage.old:
            factors = align_rows(unwrap(runner.model), stage.num_old)
            told = ', '.join(f'{name} {factor:.4g}' for name, factor in factors.items())
            runner.logger.info(f'rows of new classes scaled: {told}')


@torch.no_grad()
def align_rows(model: nn.Module, num_old: int) -> dict[str, float]:
    """Scales the rows of new classes in place.

    Args:
        model: an ``IncrementalEncoderDecoder``.
        num_old: channels of the old model, background included; at least 2.

    Returns:
        The factor of each classifier, by the name of its weight.

    Raises:
        ValueError: the rows of the new classes are 0.
    """
    keys = [f'{head}.{key}' for head, tensors in model.class_tensors.items() for key in tensors]
    # Not the tensors themselves: in SSUL's classifier those of the state dict are copies of its parts.
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    factors = {}
    for key in keys:
        if weights[key].dim() == 4:
            lengths = weights[key].flatten(1).norm(dim=1)
            old, new = lengths[1:num_old].mean(), lengths[num_old:].mean()
            if not new:
                raise ValueError(f'ClassifierAligningHook: the rows of new classes in {key} are 0')
            weights[key][num_old:] *= old / new
            factors[key] = float(old / new)
    model.load_state_dict(weights)
    return factors
