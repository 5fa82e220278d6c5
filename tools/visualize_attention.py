# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draws what a class region or a point attends to in the old and in the new model, and the difference.

python tools/visualize_attention.py STAGE_DIR IMAGE [--class person | --point X Y] [--mask FILE] [--out FILE]

The same as `mmseg-sats attention`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('attention', arguments)


if __name__ == '__main__':
    sys.exit(main())
