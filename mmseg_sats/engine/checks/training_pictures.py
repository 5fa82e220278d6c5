# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Contact sheets of a stage's training pictures as the model gets them: crop, mask, labels, pseudo-labels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS

from mmseg_sats.engine.config.stage_config import build_stage_config, stage_dir
from mmseg_sats.engine.hooks.methods.pseudo_label_threshold_hook import (
    THRESHOLDS,
    PseudoLabelThresholdHook,
)
from mmseg_sats.engine.run_plan import build_protocol, find_incremental_dataset
from mmseg_sats.engine.training.stage_runner import StageRunner
from mmseg_sats.models import IncrementalEncoderDecoder
from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.utils.checkpoint import read_json, write_atomically
from mmseg_sats.visualization import contact_sheet, theme

ROWS = 6  # pictures on a sheet


def build_labeling_model(cfg: Config, folder: Path) -> IncrementalEncoderDecoder | None:
    """The stage's model, ready to complete labels; None if that is impossible, after printing why."""
    old = cfg.model.get('old_model')
    if not cfg.model.get('pseudo_labeler') or old is None:
        print(f'no pseudo-labels: {"the method has none" if old else "there is no old model in stage 0"}')
        return None
    if not Path(old['checkpoint']).is_file():
        print(f'no pseudo-labels: the old model {old["checkpoint"]} does not exist yet')
        return None
    model = MODELS.build(cfg.model)
    if flag(model.pseudo_labeler, 'needs_student', PseudoLabeler):
        print(f'no pseudo-labels: {type(model.pseudo_labeler).__name__} needs the model as it was in training')
        return None
    if flag(model.pseudo_labeler, 'needs_pass', PseudoLabeler):
        kept = folder / THRESHOLDS
        if kept.is_file():
            model.pseudo_labeler.load_state_dict(read_json(kept))
        else:
            print("finding the pseudo-labels' thresholds on the stage's training images ...")
            runner = SimpleNamespace(cfg=cfg, build_dataloader=StageRunner.build_dataloader)
            PseudoLabelThresholdHook().find(runner, model)
    return model


def browse(cfg: Config, work_dir: Path, stage_index: int, number: int, out: Path) -> list[Path]:
    """Draws the sheets.

    Args:
        cfg: a run's config, its defaults set.
        work_dir: the run whose snapshots give pseudo-labels.
        stage_index: the stage.
        number: how many pictures.
        out: the folder to write into.

    Returns:
        The files.

    Raises:
        ValueError: no such stage, or less than one picture.
        FileNotFoundError: the data are not there.
    """
    if number < 1:
        raise ValueError(f'--number {number}: expected at least 1 picture')
    protocol = build_protocol(cfg)
    stage = protocol.stage(stage_index)
    cfg = build_stage_config(cfg, protocol, stage, work_dir)
    dataset = DATASETS.build(contact_sheet.keep_full_labels(cfg.train_dataloader.dataset))
    seed = cfg.get('seed') or 0
    order = np.random.default_rng(seed).permutation(len(dataset))[:number]
    np.random.seed(seed)  # mmcv draws its crops from here
    pictures = contact_sheet.training_pictures(
        [dataset[int(index)] for index in order],
        build_labeling_model(cfg, stage_dir(work_dir, stage.index)),
    )
    inner = find_incremental_dataset(dataset)
    names, palette = inner.class_names, list(inner.dataset.metainfo['palette'])
    palette = [[0, 0, 0]] * (len(names) - len(palette)) + palette
    meta = dataset.metainfo
    learned = ', '.join(names[c] for c in stage.new)
    title = f'stage {stage.index} of {protocol.name}: {len(dataset)} images, learns {learned}'
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for start in range(0, len(pictures), ROWS):
        with theme.style():
            figure = contact_sheet.draw_sheet(
                pictures[start : start + ROWS],
                (names, palette),
                (meta['classes'], meta['palette']),
                title if len(title) < 70 else f'{title[:67]}...',
            )
            theme.lay_out(figure)
            content = theme.render(figure, 'png', 'white', dpi=150)
        files.append(out / f'stage_{stage.index}_{start // ROWS}.png')
        write_atomically(files[-1], lambda file, content=content: file.write(content))
    return files
