# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Training a stage: its runner, its loop, the groups of its optimizer, and its processes."""
