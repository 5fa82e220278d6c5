# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Trains the missing runs of a table and prints the results beside the published figures.

python tools/run_table.py table1 --dataset voc_mini --methods finetune,mib,plop,ssul,sats [--report]

The same as `mmseg-sats table`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('table', arguments)


if __name__ == '__main__':
    sys.exit(main())
