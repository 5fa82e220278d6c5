# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Count a config's images and pixels per class and stage, and list every fault of its data."""

import argparse

from mmseg_sats.utils.arguments import add_cfg_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = "Count a config's images and pixels, and list all that is wrong with them"
    parser.add_argument('config', help='config file, or a name such as sats/segformer_b2_voc_15-1')
    add_cfg_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints tables, notes and faults; returns 1 if there is a fault."""
    from mmengine.registry import init_default_scope

    from mmseg_sats.engine.checks.data_tables import Check, print_tables
    from mmseg_sats.engine.command_line import message_of, read_config

    try:
        cfg = read_config(args.config, args.cfg_options)
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        check = Check(cfg)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise SystemExit(message_of(error)) from error
    if all(found.images for found in check.found.values()):
        print_tables(check)
    # Otherwise empty tables would hide the reason why there are no images.
    for fault in check.faults:
        print(f'wrong: {fault}')
    print(f'{len(check.faults)} faults' if check.faults else 'no fault found')
    return 1 if check.faults else 0
