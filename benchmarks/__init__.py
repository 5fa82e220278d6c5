# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What the parts cost, as ratios within one run; ``python -m benchmarks --help``."""
