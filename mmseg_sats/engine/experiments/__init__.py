# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Tables of runs: planning them, finding and training the missing runs, and reporting."""
