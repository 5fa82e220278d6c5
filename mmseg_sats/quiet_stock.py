# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Imports mmseg without its remarks about optional packages, which read like errors.

Its datasets print 'Could not import OneDL' (a service of the fork's makers), mmcv's transformers warn
that mmcv-lite has no deformable attention, which nothing here uses.
"""

import io
import warnings
from contextlib import redirect_stdout

with redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Fail to import')
    import mmseg.datasets
    import mmseg.models  # noqa: F401
