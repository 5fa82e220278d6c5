# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Installs the package; mmengine, mmcv and mmseg are left to whoever installs it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The lines of ``requirements/<name>.txt`` that name a distribution."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    text = (ROOT / 'mmseg_sats' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE).group(1)


setup(
    name='mmseg_sats',
    version=version(),
    description='Class-incremental semantic segmentation for mmseg, with self-attention transfer',
    license='Apache-2.0',
    packages=find_packages(include=['mmseg_sats', 'mmseg_sats.*']),
    package_data={
        'mmseg_sats.datasets.checks': ['*.csv'],
        'mmseg_sats.visualization.report': ['templates/*.j2'],
    },
    python_requires='>=3.10',
    install_requires=requirements('runtime'),
    extras_require={name: requirements(name) for name in ('mm', 'tests', 'dev', 'onnx', 'voc')},
)
