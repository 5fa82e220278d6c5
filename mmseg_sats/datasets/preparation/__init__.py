# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Published data sets out of their archives."""
