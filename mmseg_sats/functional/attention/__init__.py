# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Attention maps as objects that are computed on demand, and the class regions that they are pooled over."""
