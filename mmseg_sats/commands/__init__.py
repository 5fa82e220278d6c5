# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What `mmseg-sats` can do, one file each: ``add_arguments(parser)`` and ``run(args)``.

The command line is read before anything heavy is imported. So these files import torch, mmengine, mmseg and
whatever needs them within functions alone.
"""

import argparse
import atexit
import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mmseg_sats.utils.installed import MM, not_installed
from mmseg_sats.utils.spelling import near_match
from mmseg_sats.utils.writable import UnwritableError, check_writable
from mmseg_sats.version import __version__

# Import name to distribution, of what pip does not bring with the package: requirements/runtime.txt says why.
_BROUGHT_BY = {'torch': 'torch', 'cv2': 'opencv-python', 'matplotlib': 'matplotlib'}
COMMANDS = (
    'train', 'add', 'test', 'table', 'report', 'predict', 'attention', 'browse', 'check', 'export', 'diagnose',
    'prepare', 'convert-mit', 'demo',
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mmseg-sats`, with that of each command."""
    parser = argparse.ArgumentParser(
        prog='mmseg-sats',
        description='Continual semantic segmentation with self-attention transfer',
        epilog='`mmseg-sats COMMAND --help` says what a command takes.',
    )
    parser.add_argument('--version', action='version', version=f'mmseg-sats {__version__}')
    kinds = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for command in COMMANDS:
        module = import_module(f'{__name__}.{command.replace("-", "_")}')
        summary = module.__doc__.split('\n')[0].rstrip('.')
        module.add_arguments(kinds.add_parser(command, help=summary))
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What `mmseg-sats` was asked for; its ``run`` is the function that does it.

    Args:
        arguments: the words after `mmseg-sats`; by default those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if arguments and not arguments[0].startswith('-') and arguments[0] not in COMMANDS:
        parser.error(
            f'unknown command {arguments[0]!r}{near_match(arguments[0], COMMANDS)}; '
            f'expected one of {", ".join(COMMANDS)}'
        )
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> int:
    atexit.unregister(_leave_objects_alone)  # once, however many commands a process runs
    atexit.register(_leave_objects_alone)
    try:
        if out := getattr(args, 'out', None):
            check_writable(Path(out), f'--out {out}')
        import_module('mmseg_sats.utils.stock_messages')
        return args.run(args) or 0
    except ImportError as error:
        if advice := _advice(error):
            raise SystemExit(advice) from error
        raise
    except UnwritableError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt as error:
        print(': '.join(['interrupted', *error.args]), file=sys.stderr)
        return 128 + signal.SIGINT  # what a shell gives for a process that the signal ended


def _leave_objects_alone() -> None:
    """Ends a process sooner: Python would look for garbage among all objects of the libraries, again and again."""
    gc.collect()
    gc.freeze()


def _advice(error: ImportError) -> str | None:
    """One line for a package that is missing or too old, or None if the error may be a fault of someone's code."""
    if error.name == 'mmcv._ext':
        return 'this mmseg needs an mmcv with compiled ops, and the installed one has none: see docs/install.md'
    name = (error.name or '').split('.')[0]
    if isinstance(error, ModuleNotFoundError) and name in _BROUGHT_BY:
        return f'{name} is not installed: `pip install {_BROUGHT_BY[name]}`'
    if isinstance(error, ModuleNotFoundError) and name in MM:
        return not_installed(name)
    # Raised with a message for the reader, as mmengine does where TensorBoard is chosen and absent, or by
    # oldest_torch.py. Python itself names the module in its errors.
    return str(error) if error.name is None else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `mmseg-sats`.

    Args:
        arguments: the words after it; by default those of the process.

    Returns:
        The exit status.
    """
    if '_ARGCOMPLETE' in os.environ:  # the shell asks for the words that fit; the process ends with them
        import_module('argcomplete').autocomplete(build_parser())
    return _run(parse(arguments))


def script(command: str, arguments: Sequence[str] | None = None, adder: str = 'add_arguments') -> int:
    """One command alone, as a script of tools/.

    Args:
        command: the file in mmseg_sats/commands.
        arguments: the words after the script's name; by default those of the process.
        adder: the function of that file which adds the arguments.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser()
    getattr(import_module(f'{__name__}.{command}'), adder)(parser)
    return _run(parser.parse_args(arguments))
