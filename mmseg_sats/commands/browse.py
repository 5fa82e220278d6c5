# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draw training pictures of a stage as the model gets them."""

import argparse
from pathlib import Path

from mmseg_sats.utils.arguments import add_cfg_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Contact sheets of the training pictures of a stage'
    parser.add_argument('config', type=Path, help="a config, its name, or a run's own config.py")
    parser.add_argument('--stage', type=int, default=0, help='default: 0')
    parser.add_argument(
        '--work-dir', type=Path, help='the run whose snapshots give pseudo-labels (default: as in training)'
    )
    parser.add_argument('--number', type=int, default=12, help='pictures (default: 12)')
    parser.add_argument('--out', type=Path, help='folder to write into (default: WORK_DIR/browse)')
    add_cfg_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the contact sheets."""
    from mmengine.registry import init_default_scope

    from mmseg_sats.engine.checks.training_pictures import browse
    from mmseg_sats.engine.command_line import message_of, read_config
    from mmseg_sats.engine.config.defaults import set_defaults

    try:
        cfg = read_config(args.config, args.cfg_options)
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        set_defaults(cfg)
        work_dir = Path(args.work_dir or cfg.work_dir)
        files = browse(cfg, work_dir, args.stage, args.number, args.out or work_dir / 'browse')
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise SystemExit(message_of(error)) from error
    for file in files:
        print(f'wrote {file}')
