# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Make one page with the curves, heat maps, losses and photographs of one run or several."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'One page with the curves and pictures of runs'
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help="a run's work dir")
    parser.add_argument(
        '--out',
        type=Path,
        help='folder to write into (default: WORK_DIR/report; of several runs, report beside the first)',
    )
    parser.add_argument('--images', type=int, default=4, help='photographs (default: %(default)s)')
    parser.add_argument(
        '--attention', type=int, default=2, help='pictures of attention (default: %(default)s)'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    from mmseg_sats.visualization.report.page import write_report

    first = Path(args.work_dirs[0])
    out = args.out or (first if len(args.work_dirs) == 1 else first.parent) / 'report'
    try:
        page = write_report(args.work_dirs, out, args.images, args.attention)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f'wrote {page}, and its pictures as PNG and PDF beside it')
