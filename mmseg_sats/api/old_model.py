# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A trained mmseg model as its checkpoint and config describe it: classes, data and pipelines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS
from torch import Tensor

from mmseg_sats.api.class_table import BACKGROUND
from mmseg_sats.datasets.wrapped_dataset import leaves_out_zero
from mmseg_sats.engine.files.snapshot import write_weights
from mmseg_sats.models.heads.cascade import join_cascade
from mmseg_sats.models.heads.class_tensors import class_tensors
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from mmseg_sats.utils.spelling import near_match
from mmseg_sats.utils.user_modules import read_file

# Fewer than label_numbers.BACKGROUND_NAMES, which hold for a first class: here any channel may be background.
_CALLED_BACKGROUND = (BACKGROUND, '_background_', 'bg')


@dataclass(frozen=True, eq=False)
class OldModel:
    """A trained model.

    Args:
        checkpoint: its file.
        config: the mmseg config that it was trained with.
        cfg: that config.
        channels: names of its classes, by channel.
        background: the channel of its background class; None if it has none.
        palette: the colours of its classes by name, RGB 0..255; empty if the checkpoint has none.
    """

    checkpoint: Path
    config: Path
    cfg: Config
    channels: tuple[str, ...]
    background: int | None
    palette: Mapping[str, Sequence[int]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Its foreground classes, in the order of its channels."""
        return tuple(name for channel, name in enumerate(self.channels) if channel != self.background)

    @property
    def numbers(self) -> dict[str, int]:
        """Name to number in the masks that it was trained with, by its config; background only if it has one."""
        dataset = _dataset(self.cfg)
        if dataset.get('mask_values'):  # a FolderDataset
            return dict(dataset['mask_values'])
        first = 1 if _reduces_zero_label(dataset) else 0
        names = [BACKGROUND if c == self.background else name for c, name in enumerate(self.channels)]
        return {name: channel + first for channel, name in enumerate(names)}

    def base(self, folder: Path) -> Path:
        """A checkpoint whose classes are background, if it has one, and then :attr:`classes`.

        That is its own, unless background has another channel or another name: then the heads' rows are
        put in that order, and ``folder/old_model.pth`` is written.
        """
        names = ([] if self.background is None else [BACKGROUND]) + list(self.classes)
        if list(self.channels) == names:
            return self.checkpoint
        loaded = load_checkpoint_safely(self.checkpoint)
        order = ([] if self.background is None else [self.background]) + [
            channel for channel in range(len(self.channels)) if channel != self.background
        ]
        state_dict = {key.removeprefix('module.'): value for key, value in loaded['state_dict'].items()}
        for key, dim in _class_tensors(self.cfg.model).items() if order != sorted(order) else ():
            if key in state_dict:
                state_dict[key] = state_dict[key].index_select(dim, torch.tensor(order))
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / 'old_model.pth', state_dict, dict(dataset_meta=dict(classes=names)))
        return folder / 'old_model.pth'

    def pipeline(self, loader: str) -> list[dict[str, Any]] | None:
        """The transforms of ``train_dataloader`` or ``test_dataloader`` for data whose masks are to be loaded.

        ``LoadAnnotations`` is without options, since the masks number their classes in their own way. None if the
        config has no such transforms.
        """
        dataset = _dataset(self.cfg, loader)
        steps = dataset.get('pipeline') or self.cfg.get(loader.replace('dataloader', 'pipeline'))
        steps = [dict(step) for step in steps or ()]
        kinds = [step.get('type') for step in steps]
        if 'PackSegInputs' not in kinds:
            return None
        if 'LoadAnnotations' not in kinds:
            steps.insert(kinds.index('PackSegInputs'), dict(type='LoadAnnotations'))
        return [dict(type='LoadAnnotations') if step.get('type') == 'LoadAnnotations' else step for step in steps]

    @property
    def crop_size(self) -> int | tuple[int, int] | None:
        """(h, w) of its training images, in pixels; None if its config does not say."""
        model = self.cfg.get('model') or {}
        size = (model.get('data_preprocessor') or {}).get('size')
        for step in self.pipeline('train_dataloader') or ():
            size = step.get('crop_size', size)
        return tuple(size) if isinstance(size, list | tuple) else size

    @property
    def batch_size(self) -> int | None:
        """Images in each of its training batches; None if its config does not say."""
        return (self.cfg.get('train_dataloader') or {}).get('batch_size')


def read_old_model(
    checkpoint: str | Path, config: str | Path, names: Sequence[str] | None = None, background: str | None = None
) -> OldModel:
    """Reads a checkpoint and its config.

    Args:
        checkpoint: a checkpoint of mmseg.
        config: the config that it was trained with.
        names: its classes by channel, for a checkpoint that does not name them.
        background: its class that stands for everything else; by default the one called background.

    Raises:
        FileNotFoundError: one of the files does not exist.
        TypeError: the head cannot grow.
        ValueError: the checkpoint cannot be read safely, the config is of another model, or the classes are not known
            or do not agree with the channels.
    """
    checkpoint, config = Path(checkpoint), Path(config)
    for path, what in ((checkpoint, 'checkpoint'), (config, 'config')):
        if not path.is_file():
            raise FileNotFoundError(f'the {what} of the old model, {path}, does not exist')
    cfg = read_file(config)
    if cfg.get('model'):
        cfg.model = join_cascade(cfg.model.to_dict())
    expected = f'expected the mmseg config that {checkpoint} was trained with'
    model = cfg.get('model') or {}
    if not model.get('backbone') or not isinstance(model.get('decode_head'), Mapping):
        raise ValueError(f'{config} describes no model with one backbone and one decode head: {expected}')
    loaded = load_checkpoint_safely(checkpoint)
    count = _channels(checkpoint, loaded['state_dict'], model)
    binary = count == 1  # a sigmoid tells one class from everything else
    if model.decode_head.get('num_classes') not in (None, count, 2 if binary else count):
        raise ValueError(
            f'{config} has {model.decode_head.num_classes} classes, the checkpoint {count}: {expected}'
        )
    channels = _names(checkpoint, loaded['meta'], cfg, 2 if binary else count, names)
    found = _background(channels, background)
    if binary and found != 0:
        raise ValueError(
            f'{checkpoint} has one channel for its classes {", ".join(channels)}: expected the first of them to be '
            f'background, or background={channels[0]}, if it stands for everything else'
        )
    colours = (loaded['meta'].get('dataset_meta') or {}).get('palette') or ()
    palette = dict(zip(channels, colours, strict=False))
    return OldModel(checkpoint, config, cfg, channels, found, palette)


def _class_tensors(model: Mapping[str, Any]) -> dict[str, int]:
    """The tensors of a model's heads with a row for each class, by their names in a checkpoint; see `class_tensors`.

    Heads with one channel for two classes have none.
    """
    auxiliary = model.get('auxiliary_head') or []
    numbered = isinstance(auxiliary, list)
    heads = {'decode_head': model['decode_head']}
    for index, head in enumerate(auxiliary if numbered else [auxiliary]):
        heads[f'auxiliary_head.{index}' if numbered else 'auxiliary_head'] = head
    found: dict[str, int] = {}
    with DefaultScope.overwrite_default_scope('mmseg'), torch.random.fork_rng(devices=[]):
        for name, head in heads.items():
            if head.get('out_channels') != 1:
                tensors = class_tensors(name, MODELS.build(dict(head)), head)
                found |= {f'{name}.{key}': dim for key, dim in tensors.items()}
    return found


def _channels(checkpoint: Path, state_dict: Mapping[str, Tensor], model: Mapping[str, Any]) -> int:
    """How many channels the decode head of a checkpoint has."""
    head = dict(decode_head=model['decode_head'])
    key, dim = next(iter(_class_tensors(head).items()), ('decode_head.conv_seg.weight', 0))
    rows = {name.removeprefix('module.'): value for name, value in state_dict.items()}.get(key)
    if rows is None:
        raise ValueError(f"{checkpoint} has no {key}: expected a checkpoint with the config's decode head")
    return rows.shape[dim]


def _names(
    checkpoint: Path, meta: Mapping[str, Any], cfg: Config, count: int, given: Sequence[str] | None
) -> tuple[str, ...]:
    in_checkpoint = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    found = given or in_checkpoint or _classes_of(_dataset(cfg))
    if found is None:
        raise ValueError(
            f'neither {checkpoint} nor its config names its {count} classes: name them by old_classes, '
            'in the order of its channels'
        )
    found = tuple(str(name) for name in found)
    if len(found) != count:
        raise ValueError(
            f'{checkpoint} has {count} channels, but its classes are {len(found)}: {", ".join(found)}; expected a name '
            'for each channel, which old_classes can give'
        )
    return found


def _background(channels: Sequence[str], name: str | None) -> int | None:
    if name is not None:
        if name not in channels:
            raise ValueError(
                f'background {name}: the old model has no such class{near_match(name, channels)}; it has '
                f'{", ".join(channels)}'
            )
        return channels.index(name)
    return next((i for i, name in enumerate(channels) if name.lower() in _CALLED_BACKGROUND), None)


def _dataset(cfg: Config, loader: str = 'train_dataloader') -> dict[str, Any]:
    """The config of the innermost dataset of a loader; the first where several are joined. Empty if there is none."""
    dataset = (cfg.get(loader) or {}).get('dataset') or {}
    inner = True
    while inner:
        joined = dataset.get('datasets')
        inner = dataset.get('dataset') or dataset.get('stage_images') or (joined[0] if joined else None)
        if inner:
            dataset = dict(inner, pipeline=dataset.get('pipeline') or inner.get('pipeline'))
    return dict(dataset)


def _class(dataset: Mapping[str, Any]) -> type | None:
    kind = dataset.get('type')
    with DefaultScope.overwrite_default_scope('mmseg'):
        return DATASETS.get(kind) if isinstance(kind, str) else kind


def _classes_of(dataset: Mapping[str, Any]) -> Sequence[str] | None:
    own = (dataset.get('metainfo') or {}).get('classes')
    return own or getattr(_class(dataset), 'METAINFO', {}).get('classes')


def _reduces_zero_label(dataset: Mapping[str, Any]) -> bool:
    """Whether the numbers in the masks are one more than the channels, 0 being ignored."""
    if 'reduce_zero_label' in dataset:
        return bool(dataset['reduce_zero_label'])
    kind = _class(dataset)
    return kind is not None and leaves_out_zero(kind)


def old_dataset(old: OldModel) -> Any:
    """The training data of the old model as its config names them, without their transforms.

    Raises:
        FileNotFoundError: the config names none, or they are not there.
    """
    dataset = _dataset(old.cfg)
    try:
        if not dataset.get('type'):
            raise FileNotFoundError('it has no train_dataloader')
        with DefaultScope.overwrite_default_scope('mmseg'):
            built = DATASETS.build(dataset | dict(pipeline=[]))
            if len(built):
                return built
            raise FileNotFoundError('no image is in them')
    except (AssertionError, OSError) as error:
        raise FileNotFoundError(
            f'memory: the training data that {old.config} names cannot be read ({error}): expected them there, or '
            'old images by old_images and old_masks'
        ) from error
