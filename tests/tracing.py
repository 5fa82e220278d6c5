# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which functions of the package a test enters, in its fixtures and in the processes that it starts, too.

Imported by those at their start, so it imports nothing that takes time.
"""

import os
import sys
import threading
from typing import Any

TRACE = 'MMSEG_SATS_TRACE'  # the file that functions entered are written to
# What makes every process that finds a sitecustomize.py of this text trace, where it was told to.
SITECUSTOMIZE = f'import os\nif {TRACE!r} in os.environ:\n    from tests import tracing\n    tracing.start_tracing()\n'
_seen: set[int] = set()


def trace_into(path: str) -> None:
    """Notes in ``path`` the functions of the package that are entered from now on, here and in new processes."""
    os.environ[TRACE] = path
    _seen.clear()


def start_tracing() -> None:
    """Called by the copy's sitecustomize.py in every process that a test starts."""
    package = os.sep + 'mmseg_sats' + os.sep

    def enter(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if id(code) in _seen:
            return
        _seen.add(id(code))
        if package in code.co_filename and (path := os.environ.get(TRACE)):
            with open(path, 'a') as file:
                file.write(f'mmseg_sats/{code.co_filename.rpartition(package)[2]}:{code.co_firstlineno}\n')

    threading.settrace(enter)
    sys.settrace(enter)
