# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Unpacks ADE20K's scene parsing data from its archive and counts it."""

from dataclasses import dataclass
from pathlib import Path

from mmseg_sats.datasets.preparation.archives import (
    Progress,
    Source,
    check_archive,
    check_count,
    unpack,
)

FOLDER = 'ADEChallengeData2016'


@dataclass(frozen=True)
class Ade20kSource:
    """The archive and the numbers of images that must come out."""

    archive: Source
    training: int
    validation: int


ADE20K = Ade20kSource(
    archive=Source(
        'ADEChallengeData2016.zip',
        'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',
        '7328b3957e407ddae1d3cbf487f149ef',
    ),
    training=20210,
    validation=2000,
)


def prepare_ade20k(
    archives: Path, out: Path, source: Ade20kSource = ADE20K, progress: Progress = iter
) -> Path:
    """Unpacks images and annotations below ``ADEChallengeData2016`` and counts them.

    Args:
        archives: the folder that holds the archive.
        out: where to unpack to.
        source: the archive and the counts that must come out.
        progress: wraps the long loop.

    Returns:
        The folder ``ADEChallengeData2016``: the configs' ``data_root``.

    Raises:
        FileNotFoundError: the archive is missing; the message says where to get it.
        ValueError: it is damaged, a count is wrong or an image has no annotation.
    """
    check_archive(archives, source.archive)
    unpack(archives / source.archive.name, out, _place, progress)
    root = out / FOLDER
    for split, expected in (('training', source.training), ('validation', source.validation)):
        images = {path.stem for path in (root / 'images' / split).glob('*.jpg')}
        masks = {path.stem for path in (root / 'annotations' / split).glob('*.png')}
        check_count(split, sorted(images), expected)
        if images != masks:
            name = min(images ^ masks)
            raise ValueError(f'{split}: {name} has an image or an annotation, but not both')
    return root


def _place(name: str) -> str | None:
    wanted = (f'{FOLDER}/images/', f'{FOLDER}/annotations/')
    return name if name.startswith(wanted) else None
