# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Trains a method through all stages of its protocol.

python tools/train_incremental.py configs/sats/segformer_b2_voc_15-1.py [--work-dir D] [--resume]
"""

import argparse
import errno
import logging
import os

from mmengine.config import Config
from mmengine.registry import RUNNERS
from torch.distributed.elastic.multiprocessing.errors import record

from mmseg_sats.engine.command_line import add_cfg_options, message_of, read_config
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.files.work_dir import WorkDirBusyError
from mmseg_sats.engine.training.distributed import own_error_on_top


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description='Train a method through all stages of its protocol'
    )
    parser.add_argument('config', help='config file')
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
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def use_amp(cfg: Config) -> None:
    """Mixed precision in float16 with loss scaling, which mmengine has for GPUs alone."""
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'


def load_config(args: argparse.Namespace) -> Config:
    """The run's config, with what the command line adds."""
    cfg = read_config(args.config, args.cfg_options)
    set_defaults(cfg)
    cfg.work_dir = args.work_dir or cfg.work_dir
    cfg.launcher = args.launcher
    cfg.resume = args.resume or cfg.get('resume', False)
    cfg.base = args.base or cfg.get('base')
    if args.amp:
        use_amp(cfg)
    return cfg


@record
def main() -> None:
    """Builds the config and runs it."""
    args = parse_args()
    # If a full disk does not take the log, do not print a traceback for every line of it.
    logging.raiseExceptions = False
    try:
        runner = RUNNERS.build(load_config(args))
    except (KeyError, OSError, TypeError, ValueError) as error:
        # A mistake of the user, found before any training; the message says what and where.
        raise SystemExit(f'{type(error).__name__}: {message_of(error)}') from error
    try:
        with own_error_on_top():
            runner.train()
    except WorkDirBusyError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit(f'{error}. Make room and go on with --resume') from error


if __name__ == '__main__':
    main()
