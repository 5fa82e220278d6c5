# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Fuses the weights of a trained stage with those of the previous one (EWF)."""

import math

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.protocol import Stage
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

_OF_LOSSES = 'distillation.'  # state of the losses, which is no weight of the network


@HOOKS.register_module()
class WeightFusionHook(Hook):
    """Replaces what a stage keeps by a mean of it and the previous stage's snapshot.

    Endpoints weight fusion (Xiao et al., CVPR 2023, section 3.4): ``theta = (1 - a) theta_old + a theta_new`` with
    ``a = sqrt(N / (N + O))`` for N new and O old foreground classes. Parameters and floating-point buffers (running
    statistics of batch norms) are fused, counters are not. The rows of new classes have no counterpart in the old
    model and stay as they were trained.

    ``theta_old`` is the snapshot, the end of the previous training, and not what the stage started from: the start's
    background bias was lowered by ``log(N + 1)`` to make room for the new rows (``classifier_init='balanced'``), which
    the old model never learned.

    Args:
        new_weight: a fixed a in (0, 1]; None: the square root above.
        share: fuse only this share of each tensor's entries, those with the largest ``|theta_new - theta_old|``, and
            keep the others as trained; in (0, 1]. None: all entries.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, new_weight: float | None = None, share: float | None = None) -> None:
        for name, value in (('new_weight', new_weight), ('share', share)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= 1):
                raise ValueError(f'WeightFusionHook: {name}={value!r}, expected a number in (0, 1] or None')
        self.new_weight = new_weight
        self.share = share

    def before_snapshot(self, runner: Runner, stage: Stage) -> None:
        """Fuses the weights that are about to be kept; nothing in stage 0."""
        if not stage.old:
            return
        weight = self.new_weight
        if weight is None:
            weight = math.sqrt(len(stage.new) / len(stage.seen))
        old = load_checkpoint_safely(runner.start_from)['state_dict']
        fuse_weights(unwrap(runner.model), old, weight, self.share)
        runner.logger.info(f'weights fused: {weight:.4g} of the new model and {1 - weight:.4g} of the old one')


@torch.no_grad()
def fuse_weights(model: nn.Module, old: dict[str, Tensor], weight: float, share: float | None = None) -> None:
    """Fuses a model with an old one that has fewer classes, in place.

    Where their tensors differ in the number of rows, the model's first ones are the old one's last: new rows follow the
    old ones, and of those that waited for classes of later stages, the first are none of them any more.

    Args:
        model: an ``IncrementalEncoderDecoder``.
        old: the old model's ``state_dict``.
        weight: of the model, 1 leaves it as it is.
        share: as in :class:`WeightFusionHook`.
    """
    rows = {
        f'{head}.{key}': dim for head, tensors in model.class_tensors.items() for key, dim in tensors.items()
    }
    # Not the tensors themselves: in SSUL's classifier those of the state dict are copies of its parts.
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in weights.items():
        if key in old and value.is_floating_point() and not key.startswith(_OF_LOSSES):
            known, before = value, old[key].to(value)
            if known.shape != before.shape:
                dim = rows.get(key, 0)
                count = min(known.shape[dim], before.shape[dim])
                known = known.narrow(dim, 0, count)
                before = before.narrow(dim, before.shape[dim] - count, count)
            known.copy_(fused(before, known, weight, share))
    model.load_state_dict(weights)


def fused(old: Tensor, new: Tensor, weight: float, share: float | None = None) -> Tensor:
    """``(1 - weight) old + weight new`` of two tensors, or of the share of their entries that differ most."""
    mean = torch.lerp(old, new, weight)
    if share is None:
        return mean
    moved = (new - old).abs().flatten().topk(round(share * new.numel())).indices
    entries = new.flatten()
    return entries.index_copy(0, moved, mean.flatten()[moved]).view_as(new)
