# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Unpacking downloaded archives: checked, resumable, and never outside the target folder."""

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mmseg_sats.utils.checkpoint import write_atomically

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One archive: its file name, where it comes from, its MD5 sum."""

    name: str
    where: str
    md5: str


def md5_of(path: Path) -> str:
    """The MD5 sum of a file, as its publishers give it. It detects damage, but does not protect from malice."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open('rb') as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_archive(folder: Path, source: Source) -> None:
    """Raises unless the archive is there and whole.

    Args:
        folder: where it was downloaded to.
        source: what it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its MD5 sum differs from the source's.
    """
    path = folder / source.name
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist. Download it from {source.where}')
    found = md5_of(path)
    if found != source.md5:
        raise ValueError(
            f'{path} has the MD5 sum {found}, expected {source.md5}: the download is damaged or cut '
            f'off, or it is another file. Download it again from {source.where}'
        )


def check_count(name: str, found: Sequence[str], expected: int) -> None:
    """Raises ValueError unless a list has the number of images that it must have."""
    if len(found) != expected:
        raise ValueError(f'{name} has {len(found)} images, expected {expected}')


def unpack(
    archive: Path,
    target: Path,
    wanted: Callable[[str], str | None],
    progress: Progress = iter,
) -> int:
    """Unpacks some files of a tar or zip archive; existing files of the right size are kept.

    Every file is written under a temporary name first, so an interruption leaves no half file.

    Args:
        archive: ``.tar``, ``.tgz`` or ``.zip``.
        target: the folder to unpack into.
        wanted: from a member's name to its path below ``target``, or None to leave it out.
        progress: wraps the iteration over the members.

    Returns:
        The number of files written.

    Raises:
        ValueError: a wanted member would land outside ``target`` or is no plain file.
    """
    written = 0
    for name, size, open_member in progress(_members(archive)):
        place = wanted(name)
        if place is None:
            continue
        path = target / safe_path(place, archive)
        if path.is_file() and path.stat().st_size == size:
            continue
        source = open_member()
        if source is None:
            raise ValueError(f'{archive}: {name} is no plain file (a link?), it is not unpacked')
        path.parent.mkdir(parents=True, exist_ok=True)
        with source:
            write_atomically(path, lambda file, source=source: shutil.copyfileobj(source, file))
        written += 1
    return written


def safe_path(name: str, archive: Path) -> Path:
    """A member's path, relative and without a way up.

    Raises:
        ValueError: the path is absolute or climbs out.
    """
    path = PurePosixPath(name.replace('\\', '/'))
    if path.is_absolute() or '..' in path.parts or ':' in name or not path.parts:
        raise ValueError(f'{archive}: {name!r} would be unpacked outside the target folder')
    return Path(*path.parts)


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes] | None]]]:
    """Name, size and opener of each member that is not a folder."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    if not info.is_dir():
                        yield info.filename, info.file_size, lambda info=info: opened.open(info)
        else:
            # As a stream: a compressed archive is read once, from front to back.
            with tarfile.open(archive, 'r|*') as opened:
                for member in opened:
                    if not member.isdir():
                        yield member.name, member.size, _tar_opener(opened, member)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f'{archive} is no archive, or a damaged one: {error}') from error


def _tar_opener(opened: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes] | None]:
    # Opening a link would read whatever file it points to.
    return lambda: opened.extractfile(member) if member.isreg() else None
