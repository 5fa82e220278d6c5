# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What ``IncrementalDataset`` needs from the mmseg dataset that it wraps and from its pipeline."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmcv.transforms import LoadAnnotations
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS, TRANSFORMS

from mmseg_sats.datasets.checks.image_sizes import check_inside
from mmseg_sats.utils.shared_values import once


def build_wrapped(
    dataset: Mapping[str, Any] | BaseDataset, pipeline: Sequence[dict | Callable] | None
) -> tuple[BaseDataset, list[Callable]]:
    """The wrapped dataset and the transforms that we run in place of its own.

    Args:
        dataset: its config or an instance, see ``IncrementalDataset``.
        pipeline: transforms in place of its own, where given.

    Raises:
        TypeError: it is no subclass of mmengine's BaseDataset.
        FileNotFoundError: its folder or list does not exist.
    """
    if isinstance(dataset, Mapping):
        cfg = dict(copy.deepcopy(dataset))
        own = cfg.pop('pipeline', ())
        pipeline = own if pipeline is None else pipeline
        # All data sets of a run, of every stage, share one list of files.
        dataset = once(('data set', cfg), lambda: _build(cfg))
    if not isinstance(dataset, BaseDataset):
        raise TypeError(
            'IncrementalDataset: dataset must be the config or an instance of a subclass of '
            f"mmengine's BaseDataset, such as PascalVOCDataset, got {type(dataset).__name__}"
        )
    if pipeline is None:
        # An instance may be wrapped once per stage: its own transforms stay as they are.
        return dataset, copy.deepcopy(dataset.pipeline.transforms)
    return dataset, build_transforms(pipeline)


def _build(cfg: Mapping[str, Any]) -> BaseDataset:
    try:
        return DATASETS.build({**cfg, 'lazy_init': True})
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


def build_transforms(transforms: Sequence[dict | Callable]) -> list[Callable]:
    """Transforms of their configs; those that are built already are copied."""
    return [
        TRANSFORMS.build(t) if isinstance(t, Mapping) else copy.deepcopy(t) for t in transforms
    ]


def classes_by_label(dataset: BaseDataset) -> tuple[tuple[str, ...], list]:
    """Names and colours by annotation id, background included.

    Raises:
        ValueError: the dataset changes labels itself, or does not name its classes, or gives two the same name.
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
    if names[0].lower() != 'background':
        names, palette = ('background', *names), [[0, 0, 0], *palette]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f'{where}: metainfo.classes names {", ".join(repeated)} more than once: expected a name of its own for '
            'every class, under which results are kept'
        )
    if len(names) < 2:
        raise ValueError(f'{where}: metainfo.classes holds background alone: {names}')
    return names, palette


def with_relabelling(
    transforms: Sequence[Callable], chain: Sequence[Callable], mode: str
) -> list[Callable]:
    """The transforms with ``chain``, a ``RelabelSegMap`` first, behind every ``LoadAnnotations``.

    Raises:
        ValueError: masks are loaded with ``reduce_zero_label``, or, unless ``mode`` is ``'eval'``,
            not at all.
    """
    result = list(transforms)
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


def full_init_wrapped(dataset: BaseDataset) -> None:
    """Read the dataset's list.

    Raises:
        FileNotFoundError: its list file does not exist.
        ValueError: it gives no images, or files outside its data root.
    """
    where, ann_file = type(dataset).__name__, dataset.ann_file
    # mmseg takes every image of the folder where the list is missing: a slip of the pen in its
    # name would mix training and validation images.
    if ann_file and not os.path.isfile(ann_file):
        raise FileNotFoundError(f'{where}: ann_file {ann_file} does not exist')
    nothing = (
        f'{where} gives no images (ann_file={ann_file!r}, '
        f'data_prefix={dict(dataset.data_prefix)})'
    )
    try:
        dataset.full_init()
    except ValueError as error:  # mmengine cannot serialise an empty list
        raise ValueError(f'{nothing}: {error}') from error
    if len(dataset) == 0:
        raise ValueError(nothing)
    if ann_file and dataset.data_root:
        infos = [dataset.get_data_info(row) for row in range(len(dataset))]
        keys = ('img_path', 'seg_map_path')
        check_inside([info[k] for info in infos for k in keys if info.get(k)], dataset.data_root)


def mask_of(dataset: BaseDataset, row: int) -> str:
    """The path of the row-th image's mask; raises ValueError where it has none."""
    info = dataset.get_data_info(row)
    if not info.get('seg_map_path'):
        raise ValueError(
            f"{type(dataset).__name__}: image {info.get('img_path')} has no 'seg_map_path'; "
            "data_prefix must name the masks' folder: dict(img_path=..., seg_map_path=...)"
        )
    return info['seg_map_path']
