# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Stage 0 from a checkpoint that was trained elsewhere (``--base``)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.logging import print_log
from torch import Tensor, nn

from mmseg_sats.engine.files.snapshot import unwrap
from mmseg_sats.models.heads.classifier import add_background, shape_mismatches, split_binary
from mmseg_sats.models.heads.classifier_form import is_of_one_method
from mmseg_sats.models.heads.split_classifier import AUXILIARY
from mmseg_sats.utils.checkpoint import load_checkpoint_safely

# Tensors that only some versions of torch and mmseg save, and that need not be loaded.
_BUFFERS = ('num_batches_tracked', 'attn_mask', 'relative_position_index')
_THRESHOLD = 0.3  # mmseg's, where the config of a head with one channel for two classes gives none


def adopt_base(model: nn.Module, checkpoint: Path, classes: Sequence[str]) -> dict[str, Tensor]:
    """Takes the weights of stage 0 from a checkpoint that was trained elsewhere.

    Args:
        model: the stage-0 model, for the shapes.
        checkpoint: another run's ``stage_0/snapshot.pth``, or any mmseg checkpoint with the base classes.
            A checkpoint without a background channel gets one (``add_background``), and one with one channel for
            background and a class as well (``split_binary``).
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
    _give_channels(state_dict, model, checkpoint, None if names is None else [str(name) for name in names], classes)
    # What only this method's models have stays as it was initialised.
    untrained = [key for key in own if key not in state_dict and is_of_one_method(key)]
    if any(f'.conv_seg.{AUXILIARY}.' in key for key in untrained):
        _warn(
            f'base {checkpoint} has no auxiliary classifier: that of stage 0, from which the classes of stage 1 start, '
            'stays as it was initialised'
        )
    state_dict |= {key: own[key] for key in untrained}
    _check_fit(state_dict, model, checkpoint, classes)
    return {key: state_dict[key] for key in own}


def _give_channels(
    state_dict: dict[str, Tensor],
    model: nn.Module,
    checkpoint: Path,
    names: Sequence[str] | None,
    classes: Sequence[str],
) -> None:
    """Gives the classifiers of a checkpoint a channel for background and each base class, in place.

    Raises:
        ValueError: it has other classes, or these in another order.
    """
    channels = _channels(state_dict, model.class_tensors['decode_head'])
    # mmseg's heads for two classes may have one channel, whose sigmoid is the foreground's probability.
    binary = channels == 1 and len(classes) == 2
    with_background = binary or (names is not None and names[:1] == [classes[0]])
    without_background = channels == len(classes) - 1 and not with_background
    if channels is not None and channels != len(classes) and not (binary or without_background):
        raise ValueError(f'base {checkpoint} {_other_number(channels, names, classes)}')
    named = names is not None and len(names) == len(classes)
    expected = list(classes[1:] if without_background or (binary and not named) else classes)
    if names is not None and len(names) == len(expected) and names != expected:
        raise ValueError(f'base {checkpoint} was trained on classes {names}, expected {expected} in this order')
    for name, tensors in model.class_tensors.items():
        if without_background:
            add_background(state_dict, f'{name}.', tensors)
        elif binary:
            threshold = getattr(model.get_submodule(name), 'threshold', None)
            split_binary(state_dict, f'{name}.', _THRESHOLD if threshold is None else threshold)
    if names is None:
        _warn(f'base {checkpoint} names no classes: that they are {expected}, in this order, cannot be checked')


def _check_fit(
    state_dict: Mapping[str, Tensor], model: nn.Module, checkpoint: Path, classes: Sequence[str]
) -> None:
    """Raises ValueError if weights are missing, of another model, or not finite."""
    own = model.state_dict()
    # The model may lack a whole module of the checkpoint, e.g. an auxiliary head, but not single tensors of a
    # module that it has: then it would be another model.
    parts = {key.split('.')[0] for key in own}
    strange = [key for key in state_dict if key not in own and key.split('.')[0] in parts]
    problems = [f'{key}: missing' for key in own if key not in state_dict]
    problems += [
        f'{key}: not in the model'
        for key in strange
        if not (key.endswith(_BUFFERS) or is_of_one_method(key) or '.loss_decode.' in key)
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


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def _channels(state_dict: Mapping[str, Tensor], tensors: Mapping[str, int]) -> int | None:
    """How many channels the decode head of a checkpoint has; None if it is another kind of head."""
    key, dim = next(iter(tensors.items()))
    rows = state_dict.get(f'decode_head.{key}')
    return rows.shape[dim] if rows is not None and rows.dim() > dim else None


def _other_number(channels: int, names: Sequence[str] | None, classes: Sequence[str]) -> str:
    """What is wrong with a checkpoint of another number of classes than stage 0, and how to give them."""
    count = 2 if channels == 1 else channels
    named = names is not None and len(names) == count
    listed = f' ({", ".join(names)})' if named else ', which it does not name'
    foreground = count - (channels == 1 or (named and names[0] == classes[0]))
    return (
        f'does not fit stage 0: it has {count} classes{listed}, stage 0 has {len(classes)} ({", ".join(classes)}); '
        f'expected the same, with or without {classes[0]}. For stage 0 with the classes of the checkpoint, let '
        f"class_names begin with {classes[0]} and then these, in the checkpoint's order, and set "
        f"protocol='{foreground}-N', N new classes in each later stage"
    )
