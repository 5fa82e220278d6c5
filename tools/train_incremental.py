# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Trains a method through all stages of its protocol.

python tools/train_incremental.py configs/sats/segformer_b2_voc_15-1.py [--work-dir D] [--resume]

The same as `mmseg-sats train`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('train', arguments)


if __name__ == '__main__':
    sys.exit(main())
