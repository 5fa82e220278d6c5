# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which labels each mask holds, scanned once and kept on disk, and which images a stage selects by this."""

import hashlib
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from mmengine import dist
from mmengine.logging import print_log

from mmseg_sats.datasets.class_index.mask_scan import scan_masks
from mmseg_sats.protocol import SETTINGS, Stage
from mmseg_sats.utils.checkpoint import write_arrays
from mmseg_sats.utils.spelling import check_choice

EVAL_IMAGES = ('seen', 'all')

_FORMAT = 'mmseg_sats class index 1'


class ClassIndex:
    """Which of the 256 possible labels each of a list of masks holds.

    Args:
        files: Absolute paths of the N masks.
        packed: (N, 32) uint8, the presence of each label as bits in ``np.packbits`` order.
    """

    def __init__(self, files: Sequence[str], packed: np.ndarray) -> None:
        if packed.shape != (len(files), 32) or packed.dtype != np.uint8:
            raise ValueError(
                f'packed must be ({len(files)}, 32) uint8, got {packed.shape} {packed.dtype}'
            )
        self.files = tuple(files)
        self.packed = packed

    @classmethod
    def load_or_scan(
        cls,
        files: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        imdecode_backend: str = 'pillow',
    ) -> 'ClassIndex':
        """Read the index from the cache, scanning only masks that are new or have changed.

        In a distributed run every rank must call this: rank 0 reads and scans and the others
        receive its result, so that the cache folder need not be shared between machines.

        Args:
            files: Paths of local masks: single-channel 8-bit images.
            cache_dir: Where the cache is kept; defaults to the environment variable
                ``MMSEG_SATS_CACHE``, else ``~/.cache/mmseg_sats``. A cache that cannot be read or
                written only costs time; it does not stop the run.
            imdecode_backend: Decoder, as in mmseg's ``LoadAnnotations``.

        Raises:
            FileNotFoundError: If a mask does not exist.
            ValueError: If a mask is unreadable or not single-channel 8-bit.
        """
        paths = tuple(os.path.abspath(file) for file in files)
        if not dist.is_distributed():
            return cls(paths, _load_or_scan(paths, cache_dir, imdecode_backend))
        message: list = [None]
        if dist.is_main_process():
            # The other ranks wait for a message: an error must reach them too, or they would
            # hang until the process group's time-out hides the reason.
            try:
                message[0] = _load_or_scan(paths, cache_dir, imdecode_backend)
            except Exception as error:
                message[0] = error
        dist.broadcast_object_list(message)
        if isinstance(message[0], Exception):
            raise message[0]
        return cls(paths, message[0])

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def presence(self) -> np.ndarray:
        """(N, 256) bool: whether mask n holds label l."""
        return np.unpackbits(self.packed, axis=1).astype(bool)

    @cached_property
    def root(self) -> str:
        """The deepest folder that holds all masks."""
        return os.path.commonpath([os.path.dirname(file) for file in self.files] or [os.sep])

    @property
    def names(self) -> list[str]:
        """The masks' names relative to ``root``."""
        return [os.path.relpath(file, self.root) for file in self.files]

    def check_labels(self, num_classes: int, ignore_index: int = 255) -> None:
        """Raise a ValueError naming the first mask with a label that should not exist.

        Allowed are 0 (background), 1..``num_classes`` and ``ignore_index``.
        """
        forbidden = np.ones(256, dtype=bool)
        forbidden[: num_classes + 1] = False
        forbidden[ignore_index] = False
        wrong = self.presence & forbidden
        rows = np.flatnonzero(wrong.any(axis=1))
        if rows.size:
            labels = np.flatnonzero(wrong[rows[0]]).tolist()
            raise ValueError(
                f'{self.files[rows[0]]} holds label {labels[0]} (labels outside the range: '
                f'{labels}); allowed are 0 (background), 1 to {num_classes} and {ignore_index} '
                f'(ignore). {rows.size} of {len(self)} masks are concerned'
            )


def index_by_class(
    class_index: ClassIndex, label_ids: Mapping[int, int], ignore_index: int = 255
) -> ClassIndex:
    """The index of masks that number their classes in their own way, by class id.

    Args:
        class_index: Which numbers each mask holds.
        label_ids: Number in the masks to class id.
        ignore_index: The ignored number, unless ``label_ids`` says what it stands for.

    Raises:
        ValueError: A mask holds a number that stands for nothing; the message names the mask.
    """
    ids = {ignore_index: ignore_index, **label_ids}
    unknown = np.delete(np.arange(256), list(ids))
    wrong = class_index.presence[:, unknown]
    rows = np.flatnonzero(wrong.any(axis=1))
    if rows.size:
        raise ValueError(
            f'{class_index.files[rows[0]]} holds the numbers {unknown[wrong[rows[0]]].tolist()}, which '
            f'mask_values does not name; known are {sorted(ids)}. {rows.size} of '
            f'{len(class_index)} masks are concerned'
        )
    presence = np.zeros((len(class_index), 256), dtype=bool)
    for value, class_id in ids.items():
        presence[:, class_id] |= class_index.presence[:, value]
    return ClassIndex(class_index.files, np.packbits(presence, axis=1))


def select_train(
    presence: np.ndarray, stage: Stage, setting: str = 'overlapped', dealt: np.ndarray | None = None
) -> np.ndarray:
    """Training images of a stage.

    Args:
        presence: (N, L) bool, column = label; L must exceed every class id of the stage.
        stage: The stage.
        setting: ``'overlapped'``: images with a new class. ``'disjoint'``: of these, the images
            without a future class. ``'sequential'``: the images of ``'disjoint'``. ``'partitioned'``:
            the images that were dealt to a new class. Background and ignored pixels count nowhere.
        dealt: (N,) the class of each image, see :func:`deal`; needed by ``'partitioned'``.

    Returns:
        (M,) int64, ascending rows of ``presence``.
    """
    check_choice('setting', setting, SETTINGS)
    keep = _has_any(presence, stage.new)
    if setting == 'partitioned':
        if dealt is None:
            raise ValueError("setting='partitioned' needs dealt, the class that each image was dealt to")
        keep &= np.isin(dealt, stage.new)
    elif setting != 'overlapped':
        keep &= ~_has_any(presence, stage.future)
    return np.flatnonzero(keep).astype(np.int64)


def select_eval(presence: np.ndarray, stage: Stage, eval_images: str = 'seen') -> np.ndarray:
    """Evaluation images of a stage.

    Args:
        presence: (N, L) bool, column = label; L must exceed every class id of the stage.
        stage: The stage.
        eval_images: ``'seen'``: images with a seen foreground class; ``'all'``: every image.

    Returns:
        (M,) int64, ascending rows of ``presence``.
    """
    check_choice('eval_images', eval_images, EVAL_IMAGES)
    if eval_images == 'all':
        return np.arange(len(presence), dtype=np.int64)
    return np.flatnonzero(_has_any(presence, stage.seen)).astype(np.int64)


def _has_any(presence: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    if presence.ndim != 2 or presence.dtype != bool:
        raise ValueError(
            f'presence must be (images, labels) bool, got {presence.shape} {presence.dtype}'
        )
    if class_ids and max(class_ids) >= presence.shape[1]:
        raise ValueError(
            f'presence has the labels 0 to {presence.shape[1] - 1}, '
            f'the stage names class {max(class_ids)}'
        )
    return presence[:, np.asarray(class_ids, dtype=np.intp)].any(axis=1)


def _load_or_scan(files: Sequence[str], cache_dir: str | Path | None, backend: str) -> np.ndarray:
    # Stamps come before the scan: a mask that changes meanwhile is scanned again next time.
    stamps = _stamps(files)
    cache_file = _cache_file(files, cache_dir, backend)
    cached = _read_cache(cache_file, len(files))
    if cached is None:
        packed, stale = np.zeros((len(files), 32), np.uint8), np.arange(len(files))
    else:
        packed, stale = cached[1], np.flatnonzero((cached[0] != stamps).any(axis=1))
    if stale.size:
        packed[stale] = scan_masks([files[i] for i in stale], None, backend)
        _write_cache(cache_file, stamps, packed)
    return packed


def _stamps(files: Sequence[str]) -> np.ndarray:
    """(N, 2) int64: size in bytes and time of change in nanoseconds of each file."""
    stamps = np.empty((len(files), 2), dtype=np.int64)
    for row, file in enumerate(files):
        try:
            stat = os.stat(file)
        except FileNotFoundError:
            raise FileNotFoundError(
                f'mask {file} does not exist ({row + 1} of {len(files)} in the list)'
            ) from None
        stamps[row] = stat.st_size, stat.st_mtime_ns
    return stamps


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where what can be computed again is kept; it may not exist or be readable, which never costs a run.

    Args:
        folder: in place of the environment variable ``MMSEG_SATS_CACHE``, else ``~/.cache/mmseg_sats``.
    """
    return Path(os.path.expanduser(folder or os.environ.get('MMSEG_SATS_CACHE') or '~/.cache/mmseg_sats'))


def _cache_file(files: Sequence[str], cache_dir: str | Path | None, backend: str) -> Path:
    content = '\0'.join((_FORMAT, backend, *files))
    key = hashlib.sha256(content.encode('utf-8', 'surrogateescape')).hexdigest()[:32]
    return cache_folder(cache_dir) / f'class_index_{key}.npz'


def _read_cache(cache_file: Path, num_files: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Stamps (N, 2) and packed bits (N, 32), or None where there is no usable cache."""
    if not os.path.exists(cache_file):
        return None
    try:
        if not zipfile.is_zipfile(cache_file):
            raise ValueError('it is no npz file')
        with np.load(cache_file, allow_pickle=False) as data:
            stamps, packed = data['stamps'], data['packed']
        for array, expected in ((stamps, ((num_files, 2), np.int64)),
                                (packed, ((num_files, 32), np.uint8))):
            if (array.shape, array.dtype) != expected:
                raise ValueError(f'expected {expected}, found {array.shape} {array.dtype}')
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, struct.error,
            zipfile.BadZipFile, zlib.error) as error:
        _warn(f'class index {cache_file} is unreadable ({error}): the masks are scanned again')
        return None
    return stamps, packed


def _write_cache(cache_file: Path, stamps: np.ndarray, packed: np.ndarray) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(cache_file, stamps=stamps, packed=packed)
    except OSError as error:
        _warn(f'class index {cache_file} cannot be written ({error}): the next run scans again')


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
