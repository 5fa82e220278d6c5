# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Classifiers of mmseg heads that grow with the stages."""
