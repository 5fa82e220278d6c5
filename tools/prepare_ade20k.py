# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ADE20K's scene parsing data from its archive.

python tools/prepare_ade20k.py DOWNLOADS [--out data/ade]

The same as `mmseg-sats prepare ade20k`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('prepare', arguments, 'add_ade20k')


if __name__ == '__main__':
    sys.exit(main())
