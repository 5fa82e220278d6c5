# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A stage's model for programs that do not have this package."""
