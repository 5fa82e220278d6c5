# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What ``IncrementalDataset`` needs from the mmseg dataset that it wraps and from its pipeline."""

import codecs
import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

from mmseg_sats.datasets.checks.image_sizes import check_inside
from mmseg_sats.datasets.class_index.label_numbers import Labels, is_background
from mmseg_sats.datasets.folder import FolderDataset, label_ids
from mmseg_sats.datasets.joined_dataset import JoinedDataset, parts_of
from mmseg_sats.utils.shared_values import once
from mmseg_sats.utils.spelling import near_match


def build_wrapped(
    dataset: Mapping[str, Any] | Dataset, pipeline: Sequence[dict | Callable] | None
) -> tuple[BaseDataset | JoinedDataset, list[Callable]]:
    """The wrapped dataset and the transforms that we run in place of its own.

    Args:
        dataset: its config or an instance, see ``IncrementalDataset``.
        pipeline: transforms in place of its own, where given.

    Raises:
        TypeError: it, or a part of it, is no subclass of mmengine's BaseDataset.
        ValueError: its parts do not fit together.
        FileNotFoundError: its folder or list does not exist.
    """
    parts = [_without_pipeline(part) for part, _ in parts_of(dataset)]
    times = [number for _, number in parts_of(dataset)]
    if not parts:
        raise ValueError('IncrementalDataset: dataset is a ConcatDataset of nothing: expected datasets in it')
    if pipeline is None:
        pipeline = parts[0][1]
        if any(repr(own) != repr(pipeline) for _, own in parts):
            raise ValueError(
                'IncrementalDataset: the parts of its dataset have different pipelines: expected one for all, such as '
                "IncrementalDataset(pipeline='$train_pipeline')"
            )
    # All data sets of a run, of every stage, share one list of files.
    built = [once(('data set', part), partial(_build, part)) for part, _ in parts]
    if (len(built), times[0]) == (1, 1):
        return built[0], build_transforms(pipeline)
    key = ('joined data set', [part for part, _ in parts], times)
    return once(key, lambda: JoinedDataset(built, times)), build_transforms(pipeline)


def _without_pipeline(part: Mapping[str, Any] | Dataset) -> tuple[Any, Sequence[dict | Callable]]:
    if isinstance(part, Mapping):
        kind = DATASETS.get(part['type']) if isinstance(part.get('type'), str) else part.get('type')
        if isinstance(kind, type):
            _check_class(kind)
        cfg = dict(copy.deepcopy(part))
        return cfg, cfg.pop('pipeline', ())
    _check_kind(part)
    # An instance may be wrapped once per stage: its own transforms stay as they are.
    return part, part.pipeline.transforms


def _check_kind(dataset: Any) -> None:
    _check_class(type(dataset))


def _check_class(kind: type) -> None:
    if not issubclass(kind, BaseDataset):
        raise TypeError(
            "IncrementalDataset: dataset must be the config or an instance of a subclass of mmengine's BaseDataset, or "
            f'a ConcatDataset or RepeatDataset of such, for example PascalVOCDataset, got {kind.__name__}'
        )


def _build(cfg: Mapping[str, Any] | BaseDataset) -> BaseDataset:
    if isinstance(cfg, BaseDataset):
        return cfg
    try:
        dataset = DATASETS.build({**cfg, 'lazy_init': True})
    except AssertionError as error:
        # mmseg's VOC checks by an assertion without a message that images and list exist.
        root, prefix = cfg.get('data_root') or '', cfg.get('data_prefix') or {}
        paths = [os.path.join(root, path) for path in (*prefix.values(), cfg.get('ann_file')) if path]
        absent = [path for path in paths if not os.path.exists(path)]
        if not absent:
            raise
        raise FileNotFoundError(
            f'{absent[0]} does not exist (data_root={root!r}, seen from {os.getcwd()}): expected the '
            'data there, name its place by data_root=DIR (of --cfg-options); docs/data.md says how to make it'
        ) from error
    _check_kind(dataset)
    return dataset


def build_transforms(transforms: Sequence[dict | Callable]) -> list[Callable]:
    """Transforms of their configs; those that are built already are copied."""
    return [
        TRANSFORMS.build(t) if isinstance(t, Mapping) else copy.deepcopy(t) for t in transforms
    ]


def classes_by_label(
    dataset: BaseDataset | JoinedDataset,
    background: str | None = None,
    no_background: bool = False,
    mask_values: Mapping[str, int] | None = None,
) -> Labels:
    """Names, colours and numbers of the classes, background included.

    Args:
        dataset: the wrapped dataset.
        background: the name of the first class, which counts as background.
        no_background: label 0 is a class as any other.
        mask_values: name to number in the masks, unless the dataset has numbers of its own.

    Raises:
        ValueError: the dataset changes labels itself, or does not name its classes, or gives two the same name, or
            its classes do not fit the three options.
    """
    where = type(dataset).__name__
    if getattr(dataset, 'reduce_zero_label', False):
        raise ValueError(
            f'{where} has reduce_zero_label=True, which turns background into ignored pixels and '
            'shifts all ids; background is a class here: set reduce_zero_label=False'
        )
    if getattr(dataset, 'label_map', None) is not None:
        raise ValueError(
            f'{where} has a label_map because metainfo.classes differs from its own classes, '
            'which ignores the dropped classes instead of making them background: leave its '
            'classes whole and choose them by protocol and class_order'
        )
    metainfo = dataset.metainfo
    names, palette = tuple(metainfo.get('classes') or ()), list(metainfo.get('palette') or ())
    if not names or len(names) != len(palette):
        raise ValueError(
            f'{where}: metainfo must name the classes and a colour for each, '
            f'got {len(names)} classes and {len(palette)} colours'
        )
    _check_options(where, names, background, no_background)
    named = background is not None or is_background(names[0])
    if not named:
        names, palette = ('background', *names), [[0, 0, 0], *palette]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f'{where}: metainfo.classes names {", ".join(repeated)} more than once: expected a name of its own for '
            'every class, under which results are kept'
        )
    if len(names) < 2:
        raise ValueError(f'{where}: metainfo.classes holds background alone: {names}')
    numbers = getattr(dataset, 'label_ids', None)
    if numbers is None and mask_values:
        if no_background:
            raise ValueError(
                f'{where}: mask_values={dict(mask_values)} says what the masks hold, and so does no_background: '
                'expected one of the two'
            )
        numbers = label_ids(names, mask_values)
    elif no_background:
        numbers = {class_id - 1: class_id for class_id in range(1, len(names))}
    return Labels(names, palette, numbers, not named and numbers is None and not leaves_out_zero(type(dataset)))


def _check_options(where: str, names: Sequence[str], background: str | None, no_background: bool) -> None:
    if not isinstance(no_background, bool):
        raise ValueError(f'no_background={no_background!r}: expected True or False')
    if background is not None and background != names[0]:
        close = near_match(background, names[:1])
        raise ValueError(
            f'background={background!r}{close}: expected the class of label 0, which is {names[0]!r} in {where}'
        )
    if no_background and (background is not None or is_background(names[0])):
        raise ValueError(
            f'no_background=True, but background is {names[0]!r}, the first class of {where}: expected one of the two'
        )


def leaves_out_zero(kind: type) -> bool:
    """Whether a data set of mmseg, as ADE20K, numbers its classes from 1 and has no class for 0."""
    for base in kind.__mro__:
        option = inspect.signature(base.__init__).parameters.get('reduce_zero_label')
        if option is not None:
            return option.default is True
    return False


def with_relabelling(
    transforms: Sequence[Callable], chain: Sequence[Callable], mode: str
) -> list[Callable]:
    """The transforms with ``chain``, a ``RelabelSegMap`` first, behind every ``LoadAnnotations``.

    Raises:
        ValueError: masks are loaded with ``reduce_zero_label``, or, unless ``mode`` is ``'eval'``,
            not at all; or a transform mixes several images.
    """
    result = list(transforms)
    for transform in (one for branch in (result, *_branches(result)) for one in branch):
        if hasattr(transform, 'get_indices'):
            raise ValueError(
                f'IncrementalDataset: {type(transform).__name__} mixes several images, and the transforms of a stage '
                'see one at a time: expected a pipeline without it'
            )
    num_found = sum(_insert(branch, chain) for branch in (result, *_branches(result)))
    if mode != 'eval' and num_found == 0:
        names = [type(t).__name__ for t in transforms]
        raise ValueError(
            'IncrementalDataset: the training pipeline needs LoadAnnotations, behind which labels '
            f'are replaced by those of the stage; got {names}'
        )
    return result


def _branches(transforms: Sequence[Callable]) -> Iterator[list]:
    """The lists of transforms inside transforms: RandomChoice, TestTimeAug and the like."""
    for transform in transforms:
        for name in ('transforms', 'subroutines'):
            inner = getattr(transform, name, None)
            if isinstance(inner, list):
                yield inner
                yield from _branches(inner)
            elif callable(inner):
                yield from _branches([inner])


def _insert(transforms: list, chain: Sequence[Callable]) -> int:
    """Put the relabelling and what follows it into one list, in place; returns how many loaders it found."""
    places = [i for i, t in enumerate(transforms) if isinstance(t, LoadAnnotations)]
    for place in reversed(places):
        if getattr(transforms[place], 'reduce_zero_label', None):
            raise ValueError(
                'IncrementalDataset: LoadAnnotations(reduce_zero_label=True) shifts all ids '
                'before they are looked up; remove reduce_zero_label'
            )
        transforms[place + 1 : place + 1] = chain
    return len(places)


def mask_backend(transforms: Sequence[Callable]) -> str:
    """What decodes masks in a pipeline, as ``LoadAnnotations`` names it."""
    branches = [list(transforms), *_branches(transforms)]
    found = [one for branch in branches for one in branch if isinstance(one, LoadAnnotations)]
    return getattr(found[0], 'imdecode_backend', 'pillow') if found else 'pillow'


def full_init_wrapped(dataset: BaseDataset | JoinedDataset, mask_root: str | None = None) -> None:
    """Read the dataset's list.

    Args:
        dataset: the wrapped dataset.
        mask_root: a folder beside its data root where masks may be.

    Raises:
        FileNotFoundError: its list file does not exist.
        ValueError: it gives no images, or files outside its data root, or its list is no plain UTF-8.
    """
    if isinstance(dataset, JoinedDataset):
        for part in dataset.parts:
            full_init_wrapped(part, mask_root)
        return
    check_list(dataset)
    where = type(dataset).__name__
    nothing = (
        f'{where} gives no images (ann_file={dataset.ann_file!r}, '
        f'data_prefix={dict(dataset.data_prefix)})'
    )
    try:
        dataset.full_init()
    except ValueError as error:  # mmengine cannot serialise an empty list
        raise ValueError(f'{nothing}: {error}') from error
    if len(dataset) == 0:
        raise ValueError(nothing)
    check_places(dataset, [dataset.get_data_info(row) for row in range(len(dataset))], mask_root)


def check_list(dataset: BaseDataset) -> None:
    """See that the dataset's list file, if it has one, exists and can be read as it is meant.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it starts with a byte order mark, which mmseg takes for a part of the first name.
    """
    where, ann_file = type(dataset).__name__, dataset.ann_file
    # mmseg takes every image of the folder where the list is missing: a slip of the pen in its
    # name would mix training and validation images.
    if ann_file and not os.path.isfile(ann_file):
        raise FileNotFoundError(f'{where}: ann_file {ann_file} does not exist')
    if not ann_file or isinstance(dataset, FolderDataset):
        return
    with open(ann_file, 'rb') as file:
        start = file.read(3)
    if start.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f'{where}: ann_file {ann_file} starts with a byte order mark, which would be read as a part of the first '
            'name: expected it saved as UTF-8 without BOM'
        )


def check_places(dataset: BaseDataset, infos: Sequence[Mapping[str, Any]], mask_root: str | None = None) -> None:
    """See that what a list names is below the data root, and masks there or below ``mask_root``.

    Raises:
        ValueError: a file is elsewhere.
    """
    if not (dataset.ann_file and dataset.data_root):
        return
    check_inside([info['img_path'] for info in infos], [dataset.data_root])
    masks = [info['seg_map_path'] for info in infos if info.get('seg_map_path')]
    check_inside(masks, [dataset.data_root, *([mask_root] if mask_root else [])])


def first_of_each(paths: Sequence[str]) -> np.ndarray:
    """(N,) bool: false for an image that is listed before."""
    seen: set[str] = set()
    return np.array([not (path in seen or seen.add(path)) for path in paths], dtype=bool)


def mask_of(dataset: BaseDataset | JoinedDataset, row: int) -> str:
    """The path of the row-th image's mask; raises ValueError where it has none."""
    info = dataset.get_data_info(row)
    if not info.get('seg_map_path'):
        raise ValueError(
            f"{type(dataset).__name__}: image {info.get('img_path')} has no 'seg_map_path'; "
            "data_prefix must name the masks' folder: dict(img_path=..., seg_map_path=...)"
        )
    return info['seg_map_path']
