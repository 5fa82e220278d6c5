# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Turns the archives of VOC 2012 and SBD into the usual training layout, train_aug."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from mmseg_sats.datasets.class_index.mask_scan import read_labels
from mmseg_sats.datasets.preparation.archives import (
    Progress,
    Source,
    check_archive,
    check_count,
    unpack,
)
from mmseg_sats.utils.checkpoint import write_atomically, write_text

LISTS = 'ImageSets/Segmentation'
AUGMENTED = 'SegmentationClassAug'
_SBD_PARTS = ('train.txt', 'val.txt')


@dataclass(frozen=True)
class VocSources:
    """The two archives and the numbers of images that must come out."""

    voc: Source
    sbd: Source
    train_aug: int
    val: int


VOC = VocSources(
    voc=Source(
        'VOCtrainval_11-May-2012.tar',
        'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
        '6cd6e144f989b92b3379bac3b3de84fd',
    ),
    sbd=Source(
        'benchmark.tgz',
        'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz',
        '82b4d87ceb2ed10f6038a1cba92111cb',
    ),
    train_aug=10582,
    val=1449,
)


def prepare_voc(
    archives: Path, out: Path, sources: VocSources = VOC, progress: Progress = iter
) -> Path:
    """Makes ``VOCdevkit/VOC2012`` with ``SegmentationClassAug`` and the list ``train_aug.txt``.

    Files that exist already are not made again, so an interrupted call continues where it stopped.

    Args:
        archives: the folder that holds the two archives.
        out: where ``VOCdevkit`` is made.
        sources: the archives and the counts that must come out.
        progress: wraps the long loops.

    Returns:
        The folder ``VOCdevkit/VOC2012``: the configs' ``data_root``.

    Raises:
        FileNotFoundError: an archive is missing; the message says where to get it.
        ImportError: scipy, which reads SBD's masks, is not installed.
        ValueError: an archive is damaged, a mask is impossible or a count is wrong.
    """
    load_mat = _mat_reader()
    for source in (sources.voc, sources.sbd):
        check_archive(archives, source)
    root = out / 'VOCdevkit/VOC2012'
    unpack(archives / sources.voc.name, out, _voc_place, progress)
    unpack(archives / sources.sbd.name, root, _sbd_place, progress)
    sbd = root / '.sbd'
    augmented = {name for part in _SBD_PARTS for name in read_list(sbd / part)}
    train, val = (read_list(root / LISTS / f'{part}.txt') for part in ('train', 'val'))
    train_aug = sorted((augmented | set(train)) - set(val))
    check_count('train_aug', train_aug, sources.train_aug)
    check_count('val', val, sources.val)
    (root / AUGMENTED).mkdir(exist_ok=True)
    for name in progress(sorted({*train_aug, *val})):
        path = root / AUGMENTED / f'{name}.png'
        if not path.is_file():
            # VOC's own mask, finer than SBD's, where there is one.
            own = root / 'SegmentationClass' / f'{name}.png'
            labels = read_voc_mask(own) if own.is_file() else load_mat(sbd / 'cls' / f'{name}.mat')
            _write_mask(path, labels)
    write_text(root / LISTS / 'train_aug.txt', ''.join(f'{name}\n' for name in train_aug))
    _check_files(root, [*train_aug, *val])
    return root


def palette() -> np.ndarray:
    """(256, 3) uint8: VOC's colour (r, g, b) of each label; the bits of the label, spread over r, g, b."""
    colours = np.zeros((256, 3), np.uint8)
    for label in range(256):
        for bit in range(8):
            for channel in range(3):
                if label >> (3 * bit + channel) & 1:
                    colours[label, channel] |= 1 << (7 - bit)
    return colours


def read_voc_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 labels of one of VOC's masks, kept with a palette or as the palette's colours.

    Raises:
        ValueError: it is unreadable, or a colour is not in VOC's palette.
    """
    try:
        return read_labels(str(path))
    except ValueError:
        colours = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if colours is None:
            raise
        return labels_of_colours(colours[..., ::-1], path)


def labels_of_colours(colours: np.ndarray, path: Path) -> np.ndarray:
    """(H, W) uint8 labels of a mask in VOC's colours, (H, W, 3) r, g, b.

    Raises:
        ValueError: a colour stands for no label.
    """
    table = np.full(1 << 24, -1, np.int16)
    labels = [*range(21), 255]
    table[_packed(palette()[labels])] = labels
    found = table[_packed(colours)]
    if (found < 0).any():
        wrong = colours[found < 0][0].tolist()
        raise ValueError(f'mask {path} holds the colour {wrong}, which is not in the palette of VOC')
    return found.astype(np.uint8)


def read_list(path: Path) -> list[str]:
    """The names in a list file."""
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _packed(colours: np.ndarray) -> np.ndarray:
    wide = colours.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _mat_reader() -> Callable[[Path], np.ndarray]:
    """The reader of SBD's masks; raises ImportError where scipy is not installed."""
    if importlib.util.find_spec('scipy') is None:
        raise ImportError(
            "SBD's masks are MATLAB files, which scipy reads: `pip install 'mmseg_sats[voc]'`"
        )
    loadmat = importlib.import_module('scipy.io').loadmat

    def read(path: Path) -> np.ndarray:
        """(H, W) uint8: the class segmentation of one of SBD's files."""
        try:
            return loadmat(path)['GTcls'][0]['Segmentation'][0].astype(np.uint8)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no GTcls.Segmentation as SBD's files do") from error

    return read


def _voc_place(name: str) -> str | None:
    parts = PurePosixPath(name).parts
    kept = ('JPEGImages', 'SegmentationClass', 'ImageSets')
    if 'VOC2012' not in parts or not set(kept) & set(parts):
        return None
    return name


def _sbd_place(name: str) -> str | None:
    """``benchmark_RELEASE/dataset/cls/X.mat`` and the two lists, kept in a folder beside the data."""
    head, found, rest = name.partition('benchmark_RELEASE/dataset/')
    wanted = rest in _SBD_PARTS or (rest.startswith('cls/') and rest.endswith('.mat'))
    return f'{head}.sbd/{rest}' if found and wanted else None


def _write_mask(path: Path, labels: np.ndarray) -> None:
    wrong = np.setdiff1d(labels, [*range(21), 255])
    if wrong.size:
        raise ValueError(
            f'the mask for {path} holds the labels {wrong.tolist()}, expected 0 to 20 and 255'
        )
    png = cv2.imencode('.png', labels)[1].tobytes()
    write_atomically(path, lambda file: file.write(png))


def _check_files(root: Path, names: Iterable[str]) -> None:
    missing = [
        str(path)
        for name in names
        for path in (root / f'JPEGImages/{name}.jpg', root / AUGMENTED / f'{name}.png')
        if not path.is_file()
    ]
    if missing:
        raise ValueError(f'{len(missing)} files are missing, such as {missing[0]}')
