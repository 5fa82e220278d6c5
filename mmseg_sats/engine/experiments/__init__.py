# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Tables of runs: which there are, what of them is missing, training it, and reporting it."""
