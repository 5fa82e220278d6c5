# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Adds classes to a trained mmseg model, from its checkpoint and folders of images.

python tools/add_classes.py CHECKPOINT CONFIG --images DIR --masks DIR --classes cat,dog [--out DIR]

The same as `mmseg-sats add`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('add', arguments)


if __name__ == '__main__':
    sys.exit(main())
