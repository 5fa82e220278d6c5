# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Arguments that several commands take. They import mmengine when a value is given, not before."""

import argparse
from collections.abc import Sequence


class _Options(argparse.Action):
    """mmengine's ``DictAction``, with an answer for a word that is no KEY=VALUE."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for word in values:
            if '=' not in word:
                parser.error(f'{option_string} {word}: expected KEY=VALUE')
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option_string)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options K=V ...``, a dict by dotted key or None."""
    parser.add_argument(
        '--cfg-options', nargs='+', action=_Options, metavar='K=V', help='override config values'
    )


def comma_separated(text: str) -> list[str]:
    """A comma-separated list."""
    return [word.strip() for word in text.split(',') if word.strip()]


def numbers(text: str) -> list[int]:
    """A comma-separated list of numbers."""
    return [int(word) for word in comma_separated(text)]
