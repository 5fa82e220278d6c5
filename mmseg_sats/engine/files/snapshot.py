# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Snapshots: a stage's final weights, which the next stage, the evaluation and other mmseg tools load."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.models.heads.classifier import add_background, shape_mismatches
from mmseg_sats.utils.checkpoint import check_checksum, load_checkpoint_safely, write_checkpoint

# Tensors that only some versions of torch and mmseg save, and that need not be loaded.
_BUFFERS = ('num_batches_tracked', 'attn_mask', 'relative_position_index')


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model


def head_names(model: nn.Module) -> list[str]:
    """``decode_head`` and, where there is one, ``auxiliary_head``."""
    return [name for name, _ in unwrap(model).named_children() if name.endswith('_head')]


def trained_weights(runner: Runner) -> dict[str, Any]:
    """The model's weights as ``state_dict`` (the averaged ones if EMA is used), and its classes as ``meta``.

    Args:
        runner: the stage's runner, in or after training.
    """
    meta = dict(dataset_meta=plain_meta(runner.train_dataloader.dataset.metainfo), seed=runner.seed)
    checkpoint = dict(meta=meta, state_dict=weights_of(runner.model))
    # In this call EMAHook puts the averaged weights into `state_dict`.
    runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
    return dict(meta=checkpoint['meta'], state_dict=dict(checkpoint['state_dict']))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model, on the CPU."""
    return {key: value.detach().cpu() for key, value in unwrap(model).state_dict().items()}


def plain_meta(metainfo: dict[str, Any]) -> dict[str, Any]:
    """Classes and palette as plain lists, which ``mmseg.apis.init_model`` and a safe read accept."""
    return dict(
        classes=[str(name) for name in metainfo['classes']],
        palette=[[int(value) for value in colour] for colour in metainfo['palette']],
    )


def write_weights(path: Path, state_dict: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes ``dict(meta, state_dict)`` and its checksum. The file can be read without running code."""
    write_checkpoint(path, dict(meta=meta, state_dict=dict(state_dict)))


def load_snapshot(model: nn.Module, path: Path) -> None:
    """Loads a snapshot strictly: names and shapes of all tensors must agree.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    model = unwrap(model)
    state_dict = load_checkpoint_safely(path)['state_dict']
    own = model.state_dict()
    problems = [f'{key}: missing' for key in own if key not in state_dict]
    problems += [f'{key}: not in the model' for key in state_dict if key not in own]
    problems += shape_mismatches(state_dict, model)
    if problems:
        raise ValueError(f'{path} does not fit the model of this stage: ' + '; '.join(problems[:5]))
    model.load_state_dict(state_dict)


def adopt_base(
    model: nn.Module, head_names: Sequence[str], checkpoint: Path, classes: Sequence[str]
) -> dict[str, Tensor]:
    """Takes the weights of stage 0 from a checkpoint that was trained elsewhere.

    Args:
        model: the stage-0 model, for the shapes.
        head_names: its heads, e.g. ``['decode_head']``.
        checkpoint: another run's ``stage_0/snapshot.pth``, or any mmseg checkpoint with the base classes.
            A checkpoint without a background channel gets one (``add_background``).
        classes: names of background and base classes, in channel order.

    Returns:
        The complete state dict, with the model's shapes.

    Raises:
        ValueError: the checkpoint has other classes, another order of classes, or another model, or some
            of its weights are not finite.
    """
    loaded = load_checkpoint_safely(checkpoint)
    model = unwrap(model)
    own = model.state_dict()
    state_dict = {key.removeprefix('module.'): value for key, value in loaded['state_dict'].items()}
    # Checkpoints of mmseg before version 1 store the names as CLASSES.
    names = (loaded['meta'].get('dataset_meta') or {}).get('classes') or loaded['meta'].get('CLASSES')
    rows = state_dict.get('decode_head.conv_seg.weight', torch.empty(0)).shape[0]
    without_background = rows == len(classes) - 1
    expected = list(classes[1:] if without_background else classes)
    if names is not None and len(names) == len(expected) and list(names) != expected:
        raise ValueError(
            f'base {checkpoint} was trained on classes {list(names)}, expected {expected} in this order'
        )
    if without_background:
        for name in head_names:
            add_background(state_dict, f'{name}.')
    if names is None:
        print_log(
            f'base {checkpoint} does not name its classes: that they are {expected}, in this order, cannot '
            'be checked',
            logger='current',
            level=logging.WARNING,
        )
    problems = [f'{key}: missing' for key in own if key not in state_dict]
    # The model may lack a whole module of the checkpoint, e.g. an auxiliary head, but not single tensors of a
    # module that it has: then it would be another model.
    parts = {key.split('.')[0] for key in own}
    problems += [
        f'{key}: not in the model'
        for key in state_dict
        if key not in own and key.split('.')[0] in parts and not key.endswith(_BUFFERS) and '.loss_decode.' not in key
    ]
    problems += shape_mismatches(state_dict, model)
    if problems:
        raise ValueError(
            f'base {checkpoint} does not fit stage 0 ({len(classes)} classes with background): '
            + '; '.join(problems[:5])
            + '. Expected a checkpoint of the model in the config'
        )
    spoilt = [key for key in own if not state_dict[key].isfinite().all()]
    if spoilt:
        raise ValueError(
            f'base {checkpoint} has numbers that are not finite in {", ".join(spoilt[:5])}: expected a model '
            'whose training went well'
        )
    return {key: state_dict[key] for key in own}


def is_whole(path: Path) -> bool:
    """Whether there is a snapshot at ``path`` and its checksum is right."""
    if not path.exists():
        return False
    try:
        check_checksum(path, required=True)
    except ValueError as error:
        print_log(f'made again: {error}', logger='current', level=logging.WARNING)
        return False
    return True


def latest_checkpoint(folder: Path) -> Path | None:
    """The latest of mmengine's checkpoints in a stage's folder, or None.

    Files that cannot be read are skipped, because resuming from an earlier checkpoint gives the same result.
    """
    found = []
    for path in [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]:
        try:
            meta = load_checkpoint_safely(path)['meta']
            found.append(((meta['iter'], meta['epoch']), path))
        except (ValueError, KeyError) as error:
            print_log(f'not resumed from: {error}', logger='current', level=logging.WARNING)
    return max(found)[1] if found else None
