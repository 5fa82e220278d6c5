# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Hooks that methods and their parts bring along."""
