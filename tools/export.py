# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Writes a stage's model as config and checkpoint for an mmseg without this package, and as ONNX.

python tools/export.py work_dirs/sats/segformer_b2_voc_15-1/stage_5 [--out DIR] [--onnx]

The same as `mmseg-sats export`, see mmseg_sats/commands.
"""

import sys
from collections.abc import Sequence

from mmseg_sats.commands import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('export', arguments)


if __name__ == '__main__':
    sys.exit(main())
