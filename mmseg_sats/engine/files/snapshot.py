# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Snapshots: a stage's final weights, which the next stage, the evaluation and other mmseg tools load."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.models.heads.classifier import shape_mismatches
from mmseg_sats.utils.checkpoint import check_checksum, load_checkpoint_safely, write_checkpoint


def stage_folders(work_dir: Path, only: int | None = None) -> list[Path]:
    """The folders of a run's stages that have a snapshot, in order.

    Args:
        work_dir: the run's.
        only: a stage; by default all.

    Raises:
        FileNotFoundError: there is none, or not that of stage ``only``.
    """
    found = sorted((path.parent for path in work_dir.glob('stage_*/snapshot.pth')), key=stage_number)
    if not found:
        own = work_dir.resolve()
        of_stage = own.name.startswith('stage_') and (own / 'snapshot.pth').is_file()
        hint = f'; for one stage: {own.parent} --stage {stage_number(own)}' if of_stage else ''
        raise FileNotFoundError(
            f"{work_dir} is no run's folder, or no stage of it is finished: expected stage_0/snapshot.pth in it{hint}"
        )
    if only is None:
        return found
    chosen = [folder for folder in found if stage_number(folder) == only]
    if not chosen:
        there = ', '.join(str(stage_number(folder)) for folder in found)
        raise FileNotFoundError(f'{work_dir}/stage_{only}/snapshot.pth does not exist: expected one of stages {there}')
    return chosen


def stage_number(folder: Path) -> int:
    """The number of a stage's folder."""
    return int(folder.name.removeprefix('stage_'))


def check_classes(folder: Path, trained: Sequence[str], data: Sequence[str]) -> None:
    """Raises ValueError if a stage's snapshot was trained on other classes than those of the data."""
    if list(trained) != list(data):
        raise ValueError(
            f'{folder}/snapshot.pth was trained on classes {list(trained)}, the data have {list(data)}: '
            'expected the same in this order'
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model


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
