# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Train a method through all stages of its protocol."""

import argparse
import errno
import logging
import os

from mmseg_sats.utils.arguments import add_cfg_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Train a method through all stages of its protocol'
    parser.add_argument('config', help='config file, or a name such as sats/segformer_b2_voc_15-1')
    parser.add_argument('--work-dir', help='where to write (default: work_dirs/METHOD/CONFIG)')
    parser.add_argument('--resume', action='store_true', help='continue the run in the work dir')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--base',
        metavar='CHECKPOINT',
        help='take stage 0 from this checkpoint instead of training it',
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started; dist_train.sh and slurm_train.sh set it',
    )
    # torch.distributed.launch passes it with a dash or an underscore, torchrun by the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Builds the config and runs it."""
    from torch.distributed.elastic.multiprocessing.errors import record

    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    record(_train)(args)


def _train(args: argparse.Namespace) -> None:
    from mmengine.registry import RUNNERS

    from mmseg_sats.engine.checks.rehearsal import RehearsalError
    from mmseg_sats.engine.command_line import message_of, run_config
    from mmseg_sats.engine.files.work_dir import WorkDirBusyError
    from mmseg_sats.engine.training.distributed import own_error_on_top

    # If a full disk does not take the log, do not print a traceback for every line of it.
    logging.raiseExceptions = False
    try:
        cfg = run_config(
            args.config, args.cfg_options, work_dir=args.work_dir, resume=args.resume, base=args.base, amp=args.amp,
            launcher=args.launcher,
        )  # fmt: skip
        runner = RUNNERS.build(cfg)
    except (KeyError, OSError, TypeError, ValueError) as error:
        # A mistake of the user, found before any training; the message says what and where.
        raise SystemExit(f'{type(error).__name__}: {message_of(error)}') from error
    try:
        with own_error_on_top():
            runner.train()
    except KeyboardInterrupt:
        raise KeyboardInterrupt('the same command with --resume goes on') from None
    except (RehearsalError, WorkDirBusyError) as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit(f'{error}. Make room and go on with --resume') from error
