# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What can be wrong with the files of a data set, and how many images each stage has."""
