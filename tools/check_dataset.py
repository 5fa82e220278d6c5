# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Counts images and pixels per class and stage, and lists every fault of a config's data.

python tools/check_dataset.py configs/sats/segformer_b2_voc_15-1.py [--cfg-options k=v ...]

The same as `mmseg-sats check`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('check', arguments)


if __name__ == '__main__':
    sys.exit(main())
