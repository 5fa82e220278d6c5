# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The docs site: the pages of this folder, and an API reference out of the docstrings. `make docs` builds it."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mmseg_sats.version import __version__  # noqa: E402

project = 'mmseg_sats'
author = 'mmseg_sats contributors'
copyright = author
release = version = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.apidoc']
html_theme = 'furo'
html_title = f'{project} {release}'
exclude_patterns = ['_build']

myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = 'none'  # signatures show them
autodoc_mock_imports = ['triton']  # comes with CUDA builds of torch
autodoc_member_order = 'bysource'
# A class is described where it is written, not again where a package re-exports it.
autodoc_default_options = {'members': True, 'show-inheritance': True, 'ignore-module-all': True}
apidoc_modules = [
    dict(
        path=str(ROOT / 'mmseg_sats'),
        destination='api',
        separate_modules=True,
        module_first=True,
        automodule_options={'members', 'show-inheritance'},
    )
]


def _bars_are_bars(app, what, name, obj, options, lines: list[str]) -> None:
    """Lets docstrings write |C| for the size of a set, which reStructuredText takes for a substitution."""
    for row, line in enumerate(lines):
        parts = re.split(r'(``.*?``)', line)
        lines[row] = ''.join(
            part if part.startswith('``') else re.sub(r'(?<!\\)\|', r'\\|', part) for part in parts
        )


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect('autodoc-process-docstring', _bars_are_bars, priority=400)
