# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Evaluates the stages of a run again, from their snapshots.

python tools/test_incremental.py work_dirs/sats/segformer_b2_voc_15-1 [--stage 5]

The same as `mmseg-sats test`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('test', arguments)


if __name__ == '__main__':
    sys.exit(main())
