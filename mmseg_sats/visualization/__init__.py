# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Pictures: the report of runs, attention views, contact sheets; and where curves are logged."""

import mmseg_sats.utils.stock_messages  # noqa: F401  before all that imports mmseg
from mmseg_sats.visualization.vis_backend import OneAxisVisBackend

__all__ = ['OneAxisVisBackend']
