# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Old images beside the new: which are kept, how they are stored, and how they are mixed into batches."""
