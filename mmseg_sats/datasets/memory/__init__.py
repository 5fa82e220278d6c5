# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Memory and replay: which old images are kept, how they are stored and mixed into batches."""
