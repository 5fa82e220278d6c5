# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Add classes to a trained mmseg model: a checkpoint and folders of images in, a model that knows both out."""

import argparse
from pathlib import Path

from mmseg_sats.utils.arguments import add_cfg_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = 'Add classes to a trained mmseg model without forgetting those that it knows'
    parser.add_argument('checkpoint', type=Path, help='of the trained model')
    parser.add_argument('config', type=Path, help='the mmseg config that it was trained with')
    parser.add_argument('--images', type=Path, required=True, help='folder of images that show the new classes')
    parser.add_argument('--masks', type=Path, required=True, help='folder of their masks, name.png for name.jpg')
    parser.add_argument(
        '--classes', required=True, help='classes in these masks: cat,dog (numbers 1 and 2) or cat=11,dog=12'
    )
    few = parser.add_argument_group('a few old images, which keep the old classes far better')
    few.add_argument('--old-images', type=Path, help='folder of images of old classes')
    few.add_argument('--old-masks', type=Path, help="folder of their masks, with the old model's numbers")
    few.add_argument('--old-classes', help='names and numbers in these masks, if the config does not have them')
    few.add_argument(
        '--memory', type=int, default=0, metavar='N', help='instead: N images of the training data in the config'
    )
    val = parser.add_argument_group('evaluation (default: every fifth of the images is kept for it)')
    val.add_argument('--val-images', type=Path, help='folder of images')
    val.add_argument('--val-masks', type=Path, help="folder of their masks, numbered as the new model's channels")
    val.add_argument('--val-classes', help='names and numbers in these masks, if they are others')
    parser.add_argument('--background', help="the old model's class that stands for everything else, if so")
    parser.add_argument('--out', type=Path, default='work_dirs/add', help='where to write (default: %(default)s)')
    parser.add_argument('--method', default='sats', help='a method of this package (default: %(default)s)')
    parser.add_argument('--epochs', type=int, help='default: 12, or as many as make 700 iterations')
    parser.add_argument('--lr', type=float, help='learning rate (default: that of _base_/add_classes.py)')
    parser.add_argument('--licence', default='unknown', help='of the new model, for its card')
    parser.add_argument('--resume', action='store_true', help='go on with a run that was interrupted')
    add_cfg_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains, exports and prints what was learned and what was forgotten."""
    from mmseg_sats.api.add import add_classes
    from mmseg_sats.engine.command_line import message_of
    from mmseg_sats.engine.files.work_dir import WorkDirBusyError

    given = {key: value for key, value in vars(args).items() if key not in ('run', 'cfg_options', 'epochs')}
    values = dict(args.cfg_options or {})
    values |= {} if args.epochs is None else dict(epochs=args.epochs)
    try:
        added = add_classes(**given, **values)
    except (KeyError, OSError, TypeError, ValueError, WorkDirBusyError) as error:
        raise SystemExit(message_of(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt('the same command with --resume goes on') from None
    print(added.rows())
    memory = '' if added.peak_memory is None else f', {added.peak_memory:,.0f} MiB'
    if added.unmeasured:
        print(
            f'No image for evaluation shows {", ".join(added.unmeasured)}, so nothing is known of them: name images in '
            'which all classes are drawn by --val-images and --val-masks'
        )
    print(f'{added.seconds / 60:.1f} min{memory}; curves and pictures: {added.run.work_dir}/report/index.html')
    print(f"for mmseg: init_model('{added.out}/config.py', '{added.out}/model.pth'); its card: {added.out}/README.md")
