# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draw what a stage's model sees in images, with a legend of the classes found."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = "Draw what a stage's model sees in images"
    parser.add_argument('stage_dir', type=Path, help='folder of a finished stage: WORK_DIR/stage_K')
    parser.add_argument('images', type=Path, nargs='+', help='image files, or folders of images')
    parser.add_argument('--out', type=Path, help='where to write (default: STAGE_DIR/predictions)')
    parser.add_argument('--device', help='where the model runs (default: the GPU, if there is one)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes an overlay per image; returns 1 if an image could not be read."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from mmseg_sats.engine.export.stock import load_for_export
    from mmseg_sats.utils.checkpoint import write_atomically
    from mmseg_sats.visualization.masks import encode
    from mmseg_sats.visualization.predictions import find_images, predicted_overlay

    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        model = load_for_export(args.stage_dir)[1]
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    try:
        model = model.to(device)
    except (AssertionError, RuntimeError) as error:  # torch's messages about a device that does not exist
        raise SystemExit(f'--device {device}: {error}') from error
    images = find_images(args.images)
    if not images:
        raise SystemExit(f'no images in {", ".join(map(str, args.images))}')
    out = args.out or args.stage_dir / 'predictions'
    out.mkdir(parents=True, exist_ok=True)
    console, failed = Console(stderr=True), 0
    for path, name in track(images, description='predicting', console=console):
        try:
            png = encode(predicted_overlay(model, path), '.png')
        except ValueError as error:
            failed += 1
            console.print(str(error), style='red', markup=False, soft_wrap=True)
            continue
        write_atomically(out / name, lambda file, png=png: file.write(png))
    written = f'overlays in {out}' if failed < len(images) else 'nothing written'
    print(f'{len(images) - failed} of {len(images)} images: {written}')
    return 1 if failed else 0
