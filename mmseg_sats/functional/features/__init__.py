# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses on what an encoder's blocks give: attention maps and features."""
