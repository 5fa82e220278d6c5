# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Whether something can be written, asked before it is made. Pure Python."""

import tempfile
from pathlib import Path


class UnwritableError(OSError):
    """Raised if a place cannot be written to."""


def check_writable(path: Path, what: str) -> None:
    """Checks that files can be created in a folder or, if it does not exist, in its nearest existing parent.

    Args:
        path: the folder, or a file in it.
        what: what it is to the user, for the message.

    Raises:
        UnwritableError: they cannot; the message says why and what was expected.
    """
    place = next(one for one in (path, *path.absolute().parents) if one.exists())
    place = place.parent if place == path and place.is_file() and path.suffix else place
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UnwritableError(
            error.errno, f'{what} cannot be written to: {error.strerror} ({place}); expected a folder of your own'
        ) from error
