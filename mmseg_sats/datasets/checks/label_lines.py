# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A few lines that say how the labels of a data set are read, and how often each class occurs."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmseg_sats.datasets.class_index.label_numbers import Labels
from mmseg_sats.protocol import Protocol

_WIDTH = 116
_GLUE = '\0'  # in the place of spaces where a line must not break


class Shown(NamedTuple):
    """Which classes the images of a list show.

    Args:
        presence: (N, 256) bool, the class ids in each mask, ``ignore_index`` for ignored pixels; nothing in a row that
            is not used.
        rows: the rows that each stage trains with or is evaluated on.
    """

    presence: np.ndarray
    rows: Sequence[np.ndarray]

    def count(self, stage: int, class_id: int) -> int:
        """The stage's images that show a class."""
        return int(self.presence[np.unique(self.rows[stage]), class_id].sum())

    def absent(self, protocol: Protocol, first: int = 0) -> list[tuple[int, int]]:
        """Stage and class id of every class, learned from stage ``first`` on, that no image of its stage shows."""
        stages = protocol.stages[first:]
        return [(stage.index, c) for stage in stages for c in stage.new if not self.count(stage.index, c)]


def label_lines(
    labels: Labels, protocol: Protocol, shown: Mapping[str, Shown], ignore_index: int = 255
) -> Iterator[str]:
    """How labels are read: the number in the masks, the class and the channel, stage by stage.

    Args:
        labels: of the data sets.
        protocol: of the run.
        shown: what the images of one or more lists show, by the lists' names, for the counts.
        ignore_index: the ignored number.
    """
    numbers = _numbers_of_each(labels, protocol.num_classes, ignore_index)
    total = ' / '.join(f'{int(one.presence.any(axis=1).sum())} in {name}' for name, one in shown.items())
    yield f'labels: number in the masks, class > channel (images of the stage that show it: {" / ".join(shown)})'
    whole = ' / '.join(str(int(one.presence[:, 0].sum())) for one in shown.values())
    ignored = ' / '.join(str(int(one.presence[:, ignore_index].sum())) for one in shown.values())
    background = 'background is what is not seen yet' if not numbers[0] else f'{_listed(numbers[0])} {labels.names[0]}'
    yield f'  images: {total}; {background} > 0 ({whole}); ignored: {_listed(numbers[ignore_index])} ({ignored})'
    for stage in protocol.stages:
        channels = protocol.channels(stage)
        words = []
        for class_id in stage.new:
            counts = ' / '.join(str(one.count(stage.index, class_id)) for one in shown.values())
            number = _listed(numbers[class_id]) or '-'
            word = f'{number} {labels.names[class_id]} > {channels[class_id]} ({counts})'
            words.append(word.replace(' ', _GLUE))
        text = f'  stage {stage.index}: {", ".join(words)}'
        lines = textwrap.wrap(text, _WIDTH, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)
        for line in lines:
            yield line.replace(_GLUE, ' ')


def notes_on_classes(
    labels: Labels, protocol: Protocol, train: Shown | None, evaluation: Shown | None, first: int = 0
) -> Iterator[str]:
    """What will be missing in the results because no image shows it.

    Args:
        labels: of the data sets.
        protocol: of the run.
        train: what the training images show.
        evaluation: what the evaluation images show.
        first: the first stage that is trained.
    """
    for stage, class_id in [] if train is None else train.absent(protocol, first):
        yield (
            f'train: no image of stage {stage} shows {labels.names[class_id]}: it cannot be learned, and counts as '
            'a class of the results all the same'
        )
    for _, class_id in [] if evaluation is None else evaluation.absent(protocol):
        yield f'val: no image shows {labels.names[class_id]}, its IoU will say nothing'
    last = protocol.stages[-1].index
    if evaluation is not None and not evaluation.count(last, 0):
        yield (
            f'val: no image shows {labels.names[0]}: once all classes are learned it has no true pixel, and its '
            'IoU will say nothing'
        )


def note_on_repeated(name: str, repeated: Sequence[str]) -> Iterator[str]:
    """What becomes of images that a list names again.

    Args:
        name: of the list.
        repeated: paths of the images, for each time after the first.
    """
    if repeated:
        some = ', '.join(sorted(set(repeated))[:3])
        yield (
            f'{name}: {len(repeated)} entries repeat an image that is listed before, such as {some}: each image is '
            'used once'
        )


def _numbers_of_each(labels: Labels, num_classes: int, ignore_index: int) -> dict[int, list[int]]:
    own = {number: number for number in range(num_classes + 1)} if labels.numbers is None else labels.numbers
    pairs = ({ignore_index: ignore_index} | dict(own)).items()
    class_ids = (*range(num_classes + 1), ignore_index)
    return {class_id: [number for number, of in pairs if of == class_id] for class_id in class_ids}


def _listed(numbers: Sequence[int]) -> str:
    return '|'.join(map(str, numbers))
