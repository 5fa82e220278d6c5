# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a run leaves in its work dir: snapshots, results, and whose folder it is."""
