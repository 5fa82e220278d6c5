# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Finds out why a run forgets classes, and writes the figures and a page.

python tools/diagnose.py WORK_DIR [--stage K] [--images N] [--device D]

The same as `mmseg-sats diagnose`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('diagnose', arguments)


if __name__ == '__main__':
    sys.exit(main())
