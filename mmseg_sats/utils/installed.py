# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What is installed beside the package's code: its configs and scripts, and the libraries that it registers in.

``mmseg_sats/.mim`` is where OpenMMLab's packages have them, and where mmengine looks for the config of
``_base_ = 'mmseg_sats::sats/...'``. In a checkout it holds links; a wheel and an sdist hold the files.
"""

from pathlib import Path

from mmseg_sats.utils.spelling import near_match

_MIM = Path(__file__).parents[1] / '.mim'
CONFIGS = (_MIM / 'configs').resolve()
TOOLS = (_MIM / 'tools').resolve()
# The import names of what ``pip install 'mmseg_sats[mm]'`` brings.
MM = ('mmengine', 'mmcv', 'mmseg')


def not_installed(name: str) -> str:
    """What to say where one of ``MM`` is missing."""
    return f"{name} is not installed: `pip install 'mmseg_sats[mm]'` brings mmengine, mmcv and mmseg"


def config_names() -> list[str]:
    """``METHOD/CONFIG`` of every run that the package has a config for."""
    return sorted(
        f'{path.parent.name}/{path.stem}'
        for path in CONFIGS.glob('[!_]*/*.py')
        if path.stem != path.parent.name  # what the configs of a method share
    )


def method_names() -> list[str]:
    """The methods that the package has configs for."""
    return sorted(path.stem for path in CONFIGS.glob('[!_]*/*.py') if path.stem == path.parent.name)


def find_config(given: str | Path) -> Path:
    """The file of a config that is named by its path, or as ``sats/segformer_b2_voc_15-1``.

    Raises:
        FileNotFoundError: neither is there; the message has the nearest name.
    """
    if Path(given).exists():
        return Path(given)
    name = str(given).removesuffix('.py')
    named = CONFIGS / f'{name}.py'
    if named.is_file():
        return named
    near = near_match(name.removeprefix('configs/'), config_names())
    raise FileNotFoundError(f'config {given} does not exist{near}')
