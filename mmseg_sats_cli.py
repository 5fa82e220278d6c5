# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Where the command `mmseg-sats` and the scripts in tools/ start: reads the command line, then imports torch.

It is a module of its own because importing anything of mmseg_sats first runs mmseg_sats/__init__.py, which
registers all parts, and for that imports torch, mmcv and mmseg. This takes seconds, and a config's
``custom_imports=dict(imports=['mmseg_sats'])`` relies on it. So while the command line is read, the package
is put in place without its __init__.py. Before the command runs, the package is imported in the usual way.
"""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_PACKAGE = 'mmseg_sats'
# Import name to distribution, of what pip does not bring with the package: requirements/runtime.txt says why.
_BROUGHT_BY = {'torch': 'torch', 'cv2': 'opencv-python', 'matplotlib': 'matplotlib'}


@contextmanager
def _without_its_init() -> Iterator[None]:
    """Within it, files of the package can be imported though its __init__.py did not run.

    Nothing of that stays: afterwards the package is as if it had never been imported.
    """
    if _PACKAGE in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise SystemExit(f'{_PACKAGE} is not installed, and not on PYTHONPATH')
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split('.')[0] == _PACKAGE]:
            del sys.modules[name]


def _run(args: argparse.Namespace) -> int:
    try:
        importlib.import_module(_PACKAGE)
        return args.run(args) or 0
    except ImportError as error:
        if advice := _advice(error):
            raise SystemExit(advice) from error
        raise
    except KeyboardInterrupt as error:
        print(': '.join(['interrupted', *error.args]), file=sys.stderr)
        return 128 + signal.SIGINT  # what a shell gives for a process that the signal ended


def _advice(error: ImportError) -> str | None:
    """One line for a package that is missing or too old, or None if the error may be a fault of someone's code."""
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or '').split('.')[0]
        if error.name == 'mmcv._ext':
            return 'this mmseg needs an mmcv with compiled ops, and the installed one has none: see docs/install.md'
        if error.name in ('mmengine', 'mmcv', 'mmseg'):
            return f"{name} is not installed: `pip install 'mmseg_sats[mm]'` brings mmengine, mmcv and mmseg"
        return f'{name} is not installed: `pip install {_BROUGHT_BY[name]}`' if name in _BROUGHT_BY else None
    # Raised with a message for the reader, as mmengine does where TensorBoard is chosen and absent, or by
    # mmseg_sats/utils/oldest_torch.py. Python itself names the module in its errors.
    return str(error) if error.name is None else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `mmseg-sats`.

    Args:
        arguments: the words after it; by default those of the process.

    Returns:
        The exit status.
    """
    with _without_its_init():
        commands = importlib.import_module(f'{_PACKAGE}.commands')
        if '_ARGCOMPLETE' in os.environ:  # the shell asks for the words that fit; the process ends with them
            importlib.import_module('argcomplete').autocomplete(commands.build_parser())
        args = commands.parse(arguments)
    return _run(args)


def script(command: str, arguments: Sequence[str] | None = None, adder: str = 'add_arguments') -> int:
    """One command alone, as a script of tools/.

    Args:
        command: the file in mmseg_sats/commands.
        arguments: the words after the script's name; by default those of the process.
        adder: the function of that file which adds the arguments.

    Returns:
        The exit status.
    """
    with _without_its_init():
        module = importlib.import_module(f'{_PACKAGE}.commands.{command}')
        parser = argparse.ArgumentParser()
        getattr(module, adder)(parser)
        args = parser.parse_args(arguments)
    return _run(args)


if __name__ == '__main__':
    sys.exit(main())
