# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Builds the config of each stage from the config of a run."""
