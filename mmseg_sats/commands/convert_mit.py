# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Convert an original SegFormer MiT checkpoint to the parameter names of mmseg's encoder.

SRC is an ImageNet checkpoint as published with SegFormer (``mit_b0.pth`` to ``mit_b5.pth``), DST is
read by ``init_cfg=dict(type='Pretrained', checkpoint=DST)`` of ``MixVisionTransformer`` and of
``AttentionMixVisionTransformer``. The ImageNet classifier is left out.

Licence: the originals are published under the NVIDIA Source Code License, for non-commercial
research use. Converting them does not change that; it goes for DST as well.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = __doc__.split('\n')[0]
    parser.add_argument('src', type=Path, help='original MiT checkpoint')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Converts the file."""
    from mmseg_sats.models.backbones.original_mit import convert, load, save

    try:
        original = load(args.src)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    try:
        converted = convert(original)
    except (KeyError, ValueError) as error:
        raise SystemExit(f'{args.src}: {error.args[0]}') from error
    save(converted, args.dst)
    print(f'wrote {len(converted)} parameters to {args.dst}')
