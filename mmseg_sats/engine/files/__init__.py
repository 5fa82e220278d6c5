# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The files of a work dir: snapshots, results, locks, and the checks that a work dir belongs to the run."""
