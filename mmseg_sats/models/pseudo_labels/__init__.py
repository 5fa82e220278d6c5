# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Pseudo-labels: what the old model makes of the background."""
