# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses that are means over pixels, computed without a tensor of all pixels and channels."""
