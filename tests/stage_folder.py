# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The folder of a finished stage without the training: its config, and a snapshot of random weights."""

from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmseg_sats.engine.config.stage_config import build_stage_config
from mmseg_sats.engine.files.snapshot import write_weights
from mmseg_sats.protocol import Protocol
from tests.small_models import build

CONFIGS = Path(__file__).parents[1] / 'configs'
CLASSES = ['background', 'disc', 'square', 'cross', 'ring']
PALETTE = [[0, 0, 0], [230, 30, 40], [40, 200, 60], [50, 60, 220], [240, 200, 20]]


def make_stage(work_dir: Path, method: str = 'sats', **options: Any) -> Path:
    """Stage 1 of a method on the embedded data, five classes; ``options`` change its config."""
    cfg = Config.fromfile(CONFIGS / method / 'segformer_tiny_shapes_3-1.py')
    cfg.merge_from_dict(options)
    protocol = Protocol('3-1', num_classes=6)
    stage_cfg = build_stage_config(cfg, protocol, protocol.stages[1], work_dir)
    folder = work_dir / 'stage_1'
    folder.mkdir(parents=True)
    stage_cfg.dump(folder / 'config.py')
    model = build(dict(stage_cfg.model, old_model=None))
    for parameter in model.parameters():
        parameter.data *= 0.5  # logits of a usual size, whose last digits float32 can hold
    meta = dict(dataset_meta=dict(classes=CLASSES, palette=PALETTE))
    write_weights(folder / 'snapshot.pth', model.state_dict(), meta)
    return folder
