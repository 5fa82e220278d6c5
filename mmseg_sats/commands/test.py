# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Evaluate the stages of a run from their snapshots."""

import argparse
from pathlib import Path

from mmseg_sats.utils.arguments import add_cfg_options

LAST = 'last'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Evaluate the stages of a run from their snapshots'
    parser.add_argument('work_dir', type=Path, help="a run's work dir")
    parser.add_argument(
        '--stage', type=_stage, metavar='K|last', help='this stage only, or the last (default: every finished one)'
    )
    parser.add_argument(
        '--unchanged',
        action='store_true',
        help="stage 0's model, never trained again, on the images and classes of the last stage (or of --stage)",
    )
    parser.add_argument(
        '--out', type=Path, help='where logs and test.json (or unchanged.json) go (default: WORK_DIR/test)'
    )
    add_cfg_options(parser)
    parser.set_defaults(run=run)


def _stage(text: str) -> int | str:
    return text if text == LAST else int(text)


def run(args: argparse.Namespace) -> None:
    """Evaluates one stage or all of them."""
    from mmseg_sats.engine.command_line import message_of
    from mmseg_sats.engine.experiments.evaluate_again import evaluate_again
    from mmseg_sats.engine.files.snapshot import stage_folders
    from mmseg_sats.utils.checkpoint import write_json

    try:
        folders = stage_folders(args.work_dir, None if args.stage == LAST else args.stage)
    except FileNotFoundError as error:
        raise SystemExit(message_of(error)) from error
    if args.stage == LAST or args.unchanged:
        folders = folders[-1:]
    out = args.out or args.work_dir / 'test'
    out.mkdir(parents=True, exist_ok=True)
    path = out / ('unchanged.json' if args.unchanged else 'test.json')
    stages = []
    for folder in folders:
        model, on = (args.work_dir / 'stage_0', folder) if args.unchanged else (folder, None)
        try:
            stages.append(evaluate_again(model, out, args.cfg_options, on))
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise SystemExit(message_of(error)) from error
        write_json(path, stages)  # after each stage, so that a stop loses none
    print(f'wrote {path}')
