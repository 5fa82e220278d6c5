# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The file of a memory: readable JSON with the exemplars' names, checked whenever it is read."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmengine.dataset import BaseDataset

from mmseg_sats.utils.checkpoint import write_json
from mmseg_sats.utils.spelling import near_match

FORMAT = 'mmseg_sats exemplars 1'


@dataclass(frozen=True)
class Exemplar:
    """One kept image.

    Args:
        image: its file below the data set's image folder, with suffix and forward slashes.
        stands_for: name of the class that it was picked for, or None.
        holds: names of the classes seen so far that are labelled in it, in learning order.
    """

    image: str
    stands_for: str | None
    holds: tuple[str, ...]


@dataclass(frozen=True)
class Exemplars:
    """The memory after a stage.

    Args:
        stage: index of the stage.
        selection: registered name of what selected them.
        size: the budget.
        seed: the seed they were drawn with.
        offered: how many images were candidates so far.
        exemplars: the images, at most ``size``.
    """

    stage: int
    selection: str
    size: int
    seed: int
    offered: int
    exemplars: tuple[Exemplar, ...]


def write_exemplars(path: str | os.PathLike, memory: Exemplars) -> None:
    """Writes the file atomically."""
    write_json(path, dict(format=FORMAT) | asdict(memory))


def read_exemplars(path: str | os.PathLike, size: int | None = None) -> Exemplars:
    """Reads and checks the file.

    Args:
        path: ``stage_k/exemplars.json``.
        size: the budget that the run has; any if None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, over its budget, an image twice, or another budget.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'{path}: no such memory; each stage of a run leaves one, so run the stage before first'
        )
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        memory = _parse(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is no file of exemplars ({error!r})') from error
    names = [item.image for item in memory.exemplars]
    if len(names) > memory.size:
        raise ValueError(f'{path} is over budget: {len(names)} exemplars, its size is {memory.size}')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'{path} names images twice: {twice[:5]}')
    if size is not None and size != memory.size:
        raise ValueError(f'{path} was kept with a budget of {memory.size}, the config has memory={size}')
    return memory


def _parse(content: Mapping) -> Exemplars:
    if content['format'] != FORMAT:
        raise ValueError(f'format {content["format"]!r}, expected {FORMAT!r}')
    numbers = {name: content[name] for name in ('stage', 'size', 'seed', 'offered')}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f'{name}={value!r}, expected a whole number from 0')
    items = [
        Exemplar(str(item['image']), item['stands_for'], tuple(item['holds']))
        for item in content['exemplars']
    ]
    for item in items:
        if item.stands_for is not None and item.stands_for not in item.holds:
            raise ValueError(
                f'{item.image} stands for {item.stands_for!r} but holds {list(item.holds)}'
            )
    return Exemplars(selection=str(content['selection']), exemplars=tuple(items), **numbers)


def image_file(dataset: BaseDataset, info: Mapping) -> str:
    """An image of a data set as its memory names it: below the image folder, with suffix."""
    root = dataset.data_prefix.get('img_path') or '.'
    return Path(os.path.relpath(info['img_path'], root)).as_posix()


def exemplar_rows(
    path: str | os.PathLike, dataset: BaseDataset, class_names: Sequence[str]
) -> list[int]:
    """The rows of the exemplars in a data set, in the file's order.

    Args:
        path: the memory file.
        dataset: the data set that it was chosen from.
        class_names: the data set's classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of exemplars, or one of another data set.
    """
    memory = read_exemplars(path)
    where = type(dataset).__name__
    for item in memory.exemplars:
        for name in item.holds:
            if name not in class_names:
                raise ValueError(
                    f'{path} was chosen from another data set: {where} has no class {name!r}'
                    f'{near_match(name, class_names)}; it has {list(class_names)}'
                )
    # An image that is listed twice counts where it stands first.
    rows = reversed(range(len(dataset)))
    row_of = {image_file(dataset, dataset.get_data_info(row)): row for row in rows}
    unknown = [item.image for item in memory.exemplars if item.image not in row_of]
    if unknown:
        raise ValueError(
            f'{path} names {len(unknown)} of {len(memory.exemplars)} images that {where} does not '
            f'have, the first is {unknown[0]!r}{near_match(unknown[0], list(row_of))}: expected '
            f'files below {dataset.data_prefix.get("img_path")}'
        )
    return [row_of[item.image] for item in memory.exemplars]
