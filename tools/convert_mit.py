# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Convert an original SegFormer MiT checkpoint to the parameter names of mmseg's encoder.

python tools/convert_mit.py SRC DST

The same as `mmseg-sats convert-mit`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('convert_mit', arguments)


if __name__ == '__main__':
    sys.exit(main())
