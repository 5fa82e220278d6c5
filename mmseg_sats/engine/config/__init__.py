# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""From a run's config to the config of each stage."""
