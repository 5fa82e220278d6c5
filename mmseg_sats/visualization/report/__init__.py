# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The report of one run or several: one page with curves, tables and pictures."""
