# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that images and masks have the same size and are inside the data root, before they are used."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from mmseg_sats.utils.checkpoint import write_text

_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # EXIF: which of its values exchange width and height
_TURNABLE = ('JPEG', 'MPO')


def check_sizes(pairs: Sequence[tuple[str, str]], cache_dir: str | Path | None = None) -> None:
    """Compares the sizes of images and masks, from the files' headers.

    Files that passed once are not opened again until one of them changes.

    Args:
        pairs: paths of an image and its mask.
        cache_dir: where it is recorded which files passed; as in ``ClassIndex.load_or_scan``.

    Raises:
        FileNotFoundError: an image or mask does not exist.
        ValueError: a file is no image, or an image and its mask have different sizes.
    """
    noted = _note(pairs, cache_dir)
    if noted.exists():
        return
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_check_pair, pairs))
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


def _note(pairs: Sequence[tuple[str, str]], cache_dir: str | Path | None) -> Path:
    digest = hashlib.sha256()
    for path in (path for pair in pairs for path in pair):
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            raise FileNotFoundError(f'{path} does not exist') from None
        digest.update(f'{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0'.encode(errors='surrogateescape'))
    folder = cache_dir or os.environ.get('MMSEG_SATS_CACHE') or '~/.cache/mmseg_sats'
    return Path(os.path.expanduser(folder)) / f'same_sizes_{digest.hexdigest()[:32]}'


def _check_pair(pair: tuple[str, str]) -> None:
    image, mask = (size_of(path) for path in pair)
    if image != mask:
        raise ValueError(
            f'image {pair[0]} is {image[0]} x {image[1]} (width x height), its mask {pair[1]} is '
            f'{mask[0]} x {mask[1]}: expected the same size'
        )


def check_decodes(path: str) -> None:
    """Decodes an image only to see whether it can be decoded.

    Raises:
        ValueError: it is cut off or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} is cut off or damaged: {error}') from error


def size_of(path: str) -> tuple[int, int]:
    """Width and height as OpenCV reads the image, photographs turned as their EXIF says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # OpenCV turns photographs so. For a PNG, Pillow would have to decode the whole file to know.
            turned = image.format in _TURNABLE and image.getexif().get(_ORIENTATION) in _TURNED
    except FileNotFoundError:
        raise FileNotFoundError(f'image {path} does not exist') from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f'{path} is no image that can be read: {error}') from error
    return (height, width) if turned else (width, height)
