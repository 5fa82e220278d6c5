# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Why classes are forgotten: figures from the snapshots of a run, and a sentence for each finding."""
