# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A lock on a file, held by a process and its children until the last of them ends, however it ends."""

import fcntl
import os
import socket
import time
from pathlib import Path


class FileLock:
    """A lock that the kernel keeps.

    The file remains, but does not mean that it is locked: the lock of a process that has ended is free.
    A child that is given :attr:`descriptor` holds the lock too, so if the process that started a run is
    killed, the run stays locked until it ends itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self) -> bool:
        """Takes the lock; False where somebody else has it.

        Raises:
            OSError: the file system does not support locks.
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
        """Gives the lock up, also for the children that hold it."""
        if self.descriptor is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = None
