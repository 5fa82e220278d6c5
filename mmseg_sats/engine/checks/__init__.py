# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that a run makes before any training, and what `check` and `browse` show of the data."""
