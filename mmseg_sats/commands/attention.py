# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draw what a class region or a point attends to before and after a stage."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'What a class region or a point attends to, before and after a stage'
    parser.add_argument('stage_dir', type=Path, help="a run's stage_k, k from 1 on")
    parser.add_argument('image', type=Path, help='an image file')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--class', dest='class_name', help='default: the largest class in the image')
    where.add_argument('--point', type=float, nargs=2, metavar=('X', 'Y'), help='in pixels')
    parser.add_argument(
        '--mask', type=Path, help="the image's annotation file (default: the new model's prediction)"
    )
    parser.add_argument(
        '--out', type=Path, help='PNG to write (default: IMAGE_attention.png in STAGE_DIR)'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the picture and prints each block's distance, its term in L_a."""
    from mmseg_sats.visualization.attention_picture import draw

    try:
        out = draw(args)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f'wrote {out}')
