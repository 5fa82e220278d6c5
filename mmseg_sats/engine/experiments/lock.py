# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A lock on a file, held by a process and its children: it ends with the last of them, however they end."""

import fcntl
import os
import socket
import time
from pathlib import Path


class FileLock:
    """A lock that the kernel keeps.

    The file stays behind and means nothing by itself: a lock of a process that is gone is no lock. A
    child that is given :attr:`descriptor` holds it too, so a run whose starter was killed stays locked
    until it ends itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self) -> bool:
        """Takes the lock; False where somebody else has it.

        Raises:
            OSError: the file system knows no locks.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        started = time.strftime('%Y-%m-%d %H:%M:%S')
        os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()} since {started}'.encode())
        self.descriptor = descriptor
        return True

    def holder(self) -> str:
        """Who took the lock last, for messages."""
        return self.path.read_text() if self.path.exists() else 'nobody'

    def release(self) -> None:
        """Gives the lock up, for the children that have it too."""
        if self.descriptor is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = None
