# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""`python -m mmseg_sats` is the command `mmseg-sats`; it imports torch before it reads the command line."""

import sys

from mmseg_sats_cli import main

if __name__ == '__main__':
    sys.exit(main())
