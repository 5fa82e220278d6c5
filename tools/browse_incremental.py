# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draws training pictures of a stage as the model gets them: crop, full mask, labels, pseudo-labels.

python tools/browse_incremental.py CONFIG --stage K [--work-dir D] [--number N] [--out DIR]
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from mmseg_sats.engine import PseudoLabelThresholdHook
from mmseg_sats.engine.command_line import add_cfg_options, message_of, read_config
from mmseg_sats.engine.config.defaults import set_defaults
from mmseg_sats.engine.config.stage_config import build_stage_config, stage_dir
from mmseg_sats.engine.run_plan import build_protocol, find_incremental_dataset
from mmseg_sats.models import IncrementalEncoderDecoder
from mmseg_sats.models.parts import PseudoLabeler, flag
from mmseg_sats.utils.checkpoint import write_atomically
from mmseg_sats.visualization import contact_sheet, theme

ROWS = 6  # pictures on a sheet


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Contact sheets of the training pictures of a stage')
    parser.add_argument('config', type=Path, help="a config, or a run's own config.py")
    parser.add_argument('--stage', type=int, default=0, help='default: 0')
    parser.add_argument(
        '--work-dir', type=Path, help='the run whose snapshots give pseudo-labels (default: as in training)'
    )
    parser.add_argument('--number', type=int, default=12, help='pictures (default: 12)')
    parser.add_argument('--out', type=Path, help='folder to write into (default: WORK_DIR/browse)')
    add_cfg_options(parser)
    return parser.parse_args(arguments)


def run_config(args: argparse.Namespace) -> tuple[Config, Path]:
    """The run's config and its work dir.

    Raises:
        FileNotFoundError: no such config.
        KeyError: an option that the config does not have.
        ValueError: the file is no run's config.
    """
    cfg = read_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    set_defaults(cfg)
    return cfg, Path(args.work_dir or cfg.work_dir)


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
    if flag(model.pseudo_labeler, 'needs_pass', PseudoLabeler):
        kept = folder / 'pseudo_label_thresholds.json'
        if kept.is_file():
            model.pseudo_labeler.load_state_dict(json.loads(kept.read_text()))
        else:
            print("finding the pseudo-labels' thresholds on the stage's training images ...")
            PseudoLabelThresholdHook().find(SimpleNamespace(cfg=cfg), model)
    return model


def browse(args: argparse.Namespace) -> list[Path]:
    """Draws the sheets; returns their files."""
    if args.number < 1:
        raise ValueError(f'--number {args.number}: expected at least 1 picture')
    cfg, work_dir = run_config(args)
    protocol = build_protocol(cfg)
    stage = protocol.stage(args.stage)
    cfg = build_stage_config(cfg, protocol, stage, work_dir)
    dataset = DATASETS.build(contact_sheet.keep_full_labels(cfg.train_dataloader.dataset))
    seed = cfg.get('seed') or 0
    order = np.random.default_rng(seed).permutation(len(dataset))[: args.number]
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
    out = args.out or work_dir / 'browse'
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
            content = theme.render(figure, 'png', dict(facecolor='white', dpi=150))
        files.append(out / f'stage_{stage.index}_{start // ROWS}.png')
        write_atomically(files[-1], lambda file, content=content: file.write(content))
    return files


def main(arguments: list[str] | None = None) -> None:
    """Writes the contact sheets."""
    try:
        files = browse(parse_args(arguments))
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise SystemExit(message_of(error)) from error
    for file in files:
        print(f'wrote {file}')


if __name__ == '__main__':
    main()
