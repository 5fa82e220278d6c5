# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Forgetting, and how SATS stops it, on the embedded data: FT and SATS from one stage 0, and joint.

make demo

The same as `mmseg-sats demo`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('demo', arguments)


if __name__ == '__main__':
    sys.exit(main())
