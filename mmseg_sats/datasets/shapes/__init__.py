# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The embedded data set: drawn scenes with textured shapes."""
