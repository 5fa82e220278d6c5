# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Labels for old classes in the background, predicted by the old model."""
