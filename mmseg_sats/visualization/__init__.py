# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Pictures of what a model sees."""
