# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How a stage is trained: its runner, its loop, its optimizer's groups, its processes."""
