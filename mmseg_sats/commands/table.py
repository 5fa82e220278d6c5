# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Train the missing runs of a table, of the paper or of your configs, and print it beside the published figures."""

import argparse
from pathlib import Path

from mmseg_sats.utils.arguments import comma_separated, numbers

# For the help alone: what there is is in engine/experiments/tables.py, which is imported with torch.
TABLES = ('table1', 'table2', 'table3', 'table4', 'figure6', 'ablations', 'combinations', 'weights')
DATASETS = ('voc', 'voc_mini', 'ccp_mini', 'ade20k', 'shapes')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Train the missing runs of a table, and print it beside the published figures'
    parser.add_argument('table', metavar='TABLE', nargs='?', help=', '.join(TABLES))
    parser.add_argument(
        '--configs', type=Path, metavar='DIR', help='in place of TABLE: a row for each config in this folder'
    )
    parser.add_argument(
        '--dataset',
        help=f"{', '.join(DATASETS)}, or a config with your data, model and schedule (default: the paper's); "
        'of --configs, their data set',
    )
    parser.add_argument(
        '--methods', type=comma_separated, metavar='A,B',
        help='rows of table1 and table2 (default: all), or beside --configs (default: none)',
    )  # fmt: skip
    parser.add_argument(
        '--variants', type=comma_separated, metavar='A,B',
        help='rows of the other tables by the names of their runs (without_attention, ...), beside the full method',
    )  # fmt: skip
    parser.add_argument('--protocols', type=comma_separated, metavar='15-1,...', help="default: the paper's")
    parser.add_argument(
        '--memory', metavar='N|none|both', help="exemplars (default: as in the paper's table)"
    )
    parser.add_argument('--seeds', type=numbers, default=[0], metavar='0,1,2')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument(
        '--threads', type=int, help='threads of each run (default: cores divided by jobs)'
    )
    parser.add_argument(
        '--out', type=Path, help='one folder for each run (default: work_dirs/DATASET)'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='K=V', help='override config values of all runs'
    )
    parser.add_argument('--report', action='store_true', help='train nothing, only print the table')
    parser.add_argument(
        '--stage-0-per-seed', action='store_true', help='train a separate stage 0 for each seed'
    )
    parser.add_argument(
        '--accept', type=comma_separated, default=[], metavar='PATH,PATH',
        help='config paths at which an existing run may differ from the requested one',
    )  # fmt: skip
    parser.add_argument(
        '--write-split', type=Path, metavar='DIR',
        help='only split the training images into DIR/fit.txt and DIR/held.txt',
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, reports; returns the exit status."""
    from rich.console import Console

    from mmseg_sats.engine.experiments.run_table import run_table

    try:
        return run_table(args, Console())
    except KeyboardInterrupt:
        print('stopped; the same command goes on where it was')
        return 130
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
