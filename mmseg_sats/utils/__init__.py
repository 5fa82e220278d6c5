# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Helpers that every other part of the package may use: files, random numbers, messages, the table of config keys."""
