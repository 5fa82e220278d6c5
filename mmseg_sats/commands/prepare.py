# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Prepare VOC or ADE20K from their archives."""

import argparse
from collections.abc import Callable
from pathlib import Path

_EPILOG = 'Where to download from is in docs/data.md, and in the message about an archive that is missing.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Prepare a data set from the archives that were downloaded'
    kinds = parser.add_subparsers(title='data sets', metavar='DATASET', required=True)
    add_voc(kinds.add_parser('voc', help='VOC 2012 with the masks of SBD'))
    add_ade20k(kinds.add_parser('ade20k', help="ADE20K's scene parsing data"))


def add_voc(parser: argparse.ArgumentParser) -> None:
    """The command line for VOC."""
    parser.description = 'Make VOCdevkit/VOC2012 with SegmentationClassAug and train_aug.txt'
    parser.epilog = _EPILOG
    parser.add_argument('archives', type=Path, help='folder with the two downloaded archives')
    parser.add_argument(
        '--out', type=Path, default=Path('data'), help='where VOCdevkit is made (default: data)'
    )
    parser.set_defaults(run=run_voc)


def add_ade20k(parser: argparse.ArgumentParser) -> None:
    """The command line for ADE20K."""
    parser.description = 'Unpack and count ADEChallengeData2016'
    parser.epilog = _EPILOG
    parser.add_argument('archives', type=Path, help='folder with the downloaded archive')
    parser.add_argument(
        '--out', type=Path, default=Path('data/ade'), help='where to unpack (default: data/ade)'
    )
    parser.set_defaults(run=run_ade20k)


def run_voc(args: argparse.Namespace) -> None:
    """Prepares VOC and says what was counted."""
    from mmseg_sats.datasets.preparation.voc import VOC, prepare_voc

    root = _prepare('VOC', prepare_voc, args)
    print(f'{root}: {VOC.train_aug} images in train_aug.txt, {VOC.val} in val.txt, all masks there')


def run_ade20k(args: argparse.Namespace) -> None:
    """Prepares ADE20K and says what was counted."""
    from mmseg_sats.datasets.preparation.ade20k import ADE20K, prepare_ade20k

    root = _prepare('ADE20K', prepare_ade20k, args)
    counted = f'{ADE20K.training} training and {ADE20K.validation} validation images'
    print(f'{root}: {counted}, all annotated')


def _prepare(name: str, prepare: Callable[..., Path], args: argparse.Namespace) -> Path:
    """The folder that ``prepare`` made, with a progress bar meanwhile; its errors end the command in one line."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    try:
        return prepare(
            args.archives,
            args.out,
            progress=lambda items: track(items, description=f'preparing {name}', console=console),
        )
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error
