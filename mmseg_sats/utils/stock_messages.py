# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Imports mmseg without four messages that look like errors but need no action.

mmseg's datasets print 'Could not import OneDL' (a service of the fork's makers). mmcv's transformers
warn that mmcv-lite has no deformable attention, which this package does not use. mmseg's cross-entropy
warns at every stage about the default of ``avg_non_ignore``, which the configs keep on purpose. torch
2.4 warns of its own use of TorchScript, whatever the filters are; 2.13 no longer does.

Raises:
    ModuleNotFoundError: mmengine, mmcv or mmseg is not installed; the message says how to install them.
"""

import io
import warnings
from contextlib import redirect_stdout

import mmseg_sats.utils.oldest_torch  # noqa: F401  before all that needs a newer one
from mmseg_sats.utils.installed import MM, not_installed

try:
    with warnings.catch_warnings(record=True):
        import torch.distributed.optim  # noqa: F401  which mmengine imports
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Fail to import')
        import mmseg.datasets
        import mmseg.models  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in MM:
        raise
    raise ModuleNotFoundError(not_installed(error.name), name=error.name) from None

warnings.filterwarnings('ignore', message='Default ``avg_non_ignore`` is False')
