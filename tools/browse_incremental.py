# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draws training pictures of a stage as the model gets them: crop, full mask, labels, pseudo-labels.

python tools/browse_incremental.py CONFIG --stage K [--work-dir D] [--number N] [--out DIR]

The same as `mmseg-sats browse`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('browse', arguments)


if __name__ == '__main__':
    sys.exit(main())
