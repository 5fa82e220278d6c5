# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""VOC 2012 and SBD from their archives to the train_aug layout.

python tools/prepare_voc.py DOWNLOADS [--out data]
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mmseg_sats.datasets.preparation.voc import VOC, prepare_voc


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Make VOCdevkit/VOC2012 with SegmentationClassAug and train_aug.txt',
        epilog=f'Download before: {VOC.voc.where} (2.0 GB) and {VOC.sbd.where} (1.4 GB)',
    )
    parser.add_argument('archives', type=Path, help='folder with the two downloaded archives')
    parser.add_argument(
        '--out', type=Path, default=Path('data'), help='where VOCdevkit is made (default: data)'
    )
    return parser.parse_args()


def main() -> None:
    """Prepares the data and says what was counted."""
    args = parse_args()
    console = Console(stderr=True)
    try:
        root = prepare_voc(
            args.archives,
            args.out,
            progress=lambda items: track(items, description='preparing VOC', console=console),
        )
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f'{root}: {VOC.train_aug} images in train_aug.txt, {VOC.val} in val.txt, all masks there')


if __name__ == '__main__':
    main()
