# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""One page with the curves, heat maps, losses and photographs of one run or several.

python tools/report.py WORK_DIR [WORK_DIR ...] [--out DIR]

The same as `mmseg-sats report`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('report', arguments)


if __name__ == '__main__':
    sys.exit(main())
