# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Which classes each image of a data set shows: found once by reading the masks, then kept in a cache."""
