# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that images and masks have the same size and are inside the data root, before they are used."""

import hashlib
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError

from mmseg_sats.datasets.class_index.index import cache_folder
from mmseg_sats.datasets.class_index.mask_scan import read_labels
from mmseg_sats.utils.checkpoint import write_text

_ORIENTATION = 274  # the number of the EXIF tag
_PILLOW_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # pixels of an image, beyond which Pillow decodes none
_LOCK = Lock()


class Sizes:
    """Widths and heights of files as they will be loaded, mostly without decoding them.

    Whether a photograph is turned as its EXIF says depends on its format and on what loads it, so this is not
    assumed: of every kind of file (format and EXIF orientation) the first is loaded and compared with its header.
    Files whose header Pillow cannot read are all loaded.

    Args:
        load: the array (H, W) or (H, W, C) of one entry of a data set's list.
        key: the key of the file's path in the entry.
        what: what the files are, for messages.
    """

    def __init__(self, load: Callable[[Mapping[str, Any]], np.ndarray], key: str, what: str) -> None:
        self.load, self.key, self.what = load, key, what
        self._turned: dict[tuple, bool | None] = {}  # by kind; None: neither as in the header nor turned

    def of(self, info: Mapping[str, Any]) -> tuple[int, int]:
        """Width and height.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it cannot be loaded.
        """
        header = _header(info[self.key], self.what)
        if header is None or header[0][0] * header[0][1] > _opencv_limit():
            return self._loaded(info)
        size, kind = header
        kind = (*kind, size[0] == size[1])  # squares look the same when they are turned
        if kind not in self._turned:
            loaded = self._loaded(info)
            self._turned[kind] = {size[::-1]: True, size: False}.get(loaded)
            return loaded
        turned = self._turned[kind]
        return self._loaded(info) if turned is None else size[::-1] if turned else size

    def _loaded(self, info: Mapping[str, Any]) -> tuple[int, int]:
        try:
            height, width = self.load(info).shape[:2]
        except (FileNotFoundError, ImportError):
            raise
        except Exception as error:  # a user's own loader may raise anything
            message = str(error).strip().replace('\n', ' ') or type(error).__name__
            raise ValueError(
                f'{self.what} {info[self.key]} is no {self.what} that can be read: {message}'
                f'{_hint(info[self.key], self.what)}'
            ) from error
        return width, height


def size_of(path: str) -> tuple[int, int]:
    """Width and height in a file's header, before a photograph is turned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: Pillow cannot read the header.
    """
    header = _header(path, 'image')
    if header is None:
        raise ValueError(f'{path} is no image that Pillow can read')
    return header[0]


def _header(path: str, what: str) -> tuple[tuple[int, int], tuple] | None:
    """Width and height in a file's header, and its kind; None where Pillow cannot tell."""
    try:
        with _opened(path) as image:
            large = image.size[0] * image.size[1] > _PILLOW_LIMIT
            return image.size, (image.format, image.mode, large, _orientation(path, image))
    except FileNotFoundError:
        raise FileNotFoundError(f'{what} {path} does not exist') from None
    except (OSError, SyntaxError, ValueError):
        return None


def _opened(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except DecompressionBombError:
        with _LOCK:  # one limit for all threads, and it does not matter for a header
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = before


def _orientation(path: str, image: Image.Image) -> int | None:
    # Pillow decodes a whole PNG to know, since the chunk may stand behind the pixels.
    if image.format == 'PNG' and not _png_has_exif(path):
        return None
    return image.getexif().get(_ORIENTATION)


def _png_has_exif(path: str) -> bool:
    with open(path, 'rb') as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack('>I4s', start)
            if kind == b'eXIf' or (kind in (b'tEXt', b'zTXt', b'iTXt') and file.peek(16)[:16] == b'Raw profile type'):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


def _opencv_limit() -> int:
    return int(os.environ.get('OPENCV_IO_MAX_IMAGE_PIXELS') or 1 << 30)


def _hint(path: str, what: str) -> str:
    header = _header(path, what)
    pixels = header[0][0] * header[0][1] if header else 0
    if pixels <= min(_PILLOW_LIMIT, _opencv_limit()):
        return ''
    return (
        f'. It has {pixels / 1e6:.0f} megapixels: expected tiles of it; OpenCV reads larger files if the environment '
        'variable OPENCV_IO_MAX_IMAGE_PIXELS allows it'
    )


class PairSizes:
    """Compares images with their masks.

    Args:
        transforms: of the pipeline; the first ones, until there is an image, load it.
        mask_backend: what decodes masks, as in mmseg's ``LoadAnnotations``.
    """

    def __init__(self, transforms: Sequence[Callable], mask_backend: str = 'pillow') -> None:
        self.transforms, self.mask_backend = list(transforms), mask_backend
        self.images = Sizes(self._image, 'img_path', 'image')
        self.masks = Sizes(lambda info: read_labels(info['seg_map_path'], mask_backend), 'seg_map_path', 'mask')

    def _image(self, info: Mapping[str, Any]) -> np.ndarray:
        results: Any = dict(info)
        for transform in self.transforms:
            results = transform(results)
            if results is None:
                break
            if results.get('img') is not None:
                return results['img']
        width, height = size_of(info['img_path'])  # the pipeline loads masks alone
        return np.empty((height, width), bool)

    def check(self, info: Mapping[str, Any]) -> None:
        """Refuses a mask that has another size than its image.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file cannot be read, or the sizes differ.
        """
        image, mask = self.images.of(info), self.masks.of(info)
        if image != mask:
            raise ValueError(
                f'image {info["img_path"]} is {image[0]} x {image[1]} (width x height)'
                f'{_as_exif_says(info["img_path"])}, its mask {info["seg_map_path"]} is {mask[0]} x {mask[1]} pixels: '
                'expected the same size'
            )

    def __repr__(self) -> str:
        return re.sub(' at 0x[0-9a-f]+', '', repr(self.transforms[:1]))


def _as_exif_says(path: str) -> str:
    header = _header(path, 'image')
    orientation = header[1][-1] if header else None
    return '' if orientation in (None, 1) else f' as it is loaded (its EXIF orientation is {orientation})'


def check_sizes(
    infos: Sequence[Mapping[str, Any]],
    transforms: Sequence[Callable],
    cache_dir: str | Path | None = None,
    mask_backend: str = 'pillow',
) -> None:
    """Compares the sizes of images and masks, mostly from the files' headers.

    Files that passed once are not opened again until one of them changes.

    Args:
        infos: entries of a data set's list, with ``img_path`` and ``seg_map_path``.
        transforms: of the pipeline, which load the images.
        cache_dir: where it is recorded which files passed; as in ``ClassIndex.load_or_scan``.
        mask_backend: what decodes masks, as in mmseg's ``LoadAnnotations``.

    Raises:
        FileNotFoundError: an image or mask does not exist.
        ValueError: a file is no image, or an image and its mask have different sizes.
    """
    pairs = PairSizes(transforms, mask_backend)
    noted = _note(infos, f'{pairs!r} {mask_backend}', cache_dir)
    if os.path.exists(noted):  # unlike Path.exists, false where the folder may not be entered
        return
    if infos:
        pairs.check(infos[0])  # so that not every thread tries out the first kind
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(pairs.check, infos[1:]))
    try:
        noted.parent.mkdir(parents=True, exist_ok=True)
        write_text(noted, '')
    except OSError:
        pass  # The next run opens the files again.


def check_inside(paths: Sequence[str], roots: Sequence[str]) -> None:
    """Checks that paths made from a list file stay below one of ``roots``; links are not followed for this.

    Raises:
        ValueError: a path does not.
    """
    tops = [os.path.normpath(os.path.abspath(root)) for root in roots]
    for path in paths:
        place = os.path.normpath(os.path.abspath(path))
        if not any(place == top or place.startswith(top.rstrip(os.sep) + os.sep) for top in tops):
            raise ValueError(
                f'{path} leaves the data root {" and ".join(roots)}: a list file names images below it, without '
                "'..' and not by an absolute path; mask_root=FOLDER allows masks in another folder"
            )


def _note(infos: Sequence[Mapping[str, Any]], loaded_by: str, cache_dir: str | Path | None) -> Path:
    digest = hashlib.sha256(loaded_by.encode())
    for path in (info[key] for info in infos for key in ('img_path', 'seg_map_path')):
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            raise FileNotFoundError(f'{path} does not exist') from None
        digest.update(f'{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0'.encode(errors='surrogateescape'))
    return cache_folder(cache_dir) / f'same_sizes_{digest.hexdigest()[:32]}'


def check_decodes(path: str) -> None:
    """Decodes an image only to see whether it can be decoded; one that Pillow does not know, or is too large, passes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut off or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, DecompressionBombError):
        return
    except FileNotFoundError:
        raise FileNotFoundError(f'image {path} does not exist') from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'{path} is cut off or damaged: {error}') from error
