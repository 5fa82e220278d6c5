# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What all parts of the package stand on: files, random numbers, messages, and the table of config keys."""
