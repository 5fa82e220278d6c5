# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What is refused before any training."""
