# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""ADE20K's scene parsing data from its archive.

python tools/prepare_ade20k.py DOWNLOADS [--out data/ade]
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mmseg_sats.datasets.preparation.ade20k import ADE20K, prepare_ade20k


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Unpack and count ADEChallengeData2016',
        epilog=f'Download before: {ADE20K.archive.where} (0.97 GB)',
    )
    parser.add_argument('archives', type=Path, help='folder with the downloaded archive')
    parser.add_argument(
        '--out', type=Path, default=Path('data/ade'), help='where to unpack (default: data/ade)'
    )
    return parser.parse_args()


def main() -> None:
    """Prepares the data and says what was counted."""
    args = parse_args()
    console = Console(stderr=True)
    try:
        root = prepare_ade20k(
            args.archives,
            args.out,
            progress=lambda items: track(items, description='preparing ADE20K', console=console),
        )
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    counted = f'{ADE20K.training} training and {ADE20K.validation} validation images'
    print(f'{root}: {counted}, all annotated')


if __name__ == '__main__':
    main()
