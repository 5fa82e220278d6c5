# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Preparing published data sets from their archives."""
