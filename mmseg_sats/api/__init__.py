# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a program calls: train a run, open one, add classes to a trained model (docs/python.md)."""

from mmseg_sats.api.add import AddedClasses, add_classes
from mmseg_sats.api.run import Run, load_run, train

__all__ = ['AddedClasses', 'Run', 'add_classes', 'load_run', 'train']
