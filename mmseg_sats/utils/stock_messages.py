# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Imports mmseg without its remarks that ask for nothing, and read like errors.

Its datasets print 'Could not import OneDL' (a service of the fork's makers), mmcv's transformers warn
that mmcv-lite has no deformable attention, which nothing here uses, and its cross-entropy names at
every stage a default that the configs leave as it is.
"""

import io
import warnings
from contextlib import redirect_stdout

with redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Fail to import')
    import mmseg.datasets
    import mmseg.models  # noqa: F401

warnings.filterwarnings('ignore', message='Default ``avg_non_ignore`` is False')
