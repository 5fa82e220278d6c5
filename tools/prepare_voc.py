# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""VOC 2012 and SBD from their archives to the train_aug layout.

python tools/prepare_voc.py DOWNLOADS [--out data]

The same as `mmseg-sats prepare voc`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('prepare', arguments, 'add_voc')


if __name__ == '__main__':
    sys.exit(main())
