# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Convert an original SegFormer MiT checkpoint to the parameter names of mmseg's encoder.

    python tools/convert_mit.py SRC DST

SRC is an ImageNet checkpoint as published with SegFormer (``mit_b0.pth`` to ``mit_b5.pth``), DST is
read by ``init_cfg=dict(type='Pretrained', checkpoint=DST)`` of ``MixVisionTransformer`` and of
``AttentionMixVisionTransformer``. The ImageNet classifier is left out.

Licence: the originals are published under the NVIDIA Source Code License, for non-commercial
research use. Converting them does not change that; it goes for DST as well.
"""

import sys
from collections.abc import Sequence

from mmseg_sats_cli import script


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return script('convert_mit', arguments)


if __name__ == '__main__':
    sys.exit(main())
