# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draws what a stage's model sees in images, with a legend of the classes found.

python tools/predict.py work_dirs/sats/segformer_b2_voc_15-1/stage_5 photo.jpg folder [--out DIR]

The same as `mmseg-sats predict`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('predict', arguments)


if __name__ == '__main__':
    sys.exit(main())
