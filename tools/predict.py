# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Draws what a stage's model sees in images, with a legend of the classes found.

python tools/predict.py work_dirs/sats/segformer_b2_voc_15-1/stage_5 photo.jpg folder [--out DIR]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import mmseg_sats  # noqa: F401  first, since it keeps what mmseg says at its import off the screen

# isort: split
from mmseg.apis import inference_model

from mmseg_sats.datasets.folder import IMAGE_SUFFIXES
from mmseg_sats.engine.export.stock import load_for_export
from mmseg_sats.utils.checkpoint import write_atomically
from mmseg_sats.visualization.overlay import draw_overlay


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw what a stage's model sees in images")
    parser.add_argument('stage_dir', type=Path, help='folder of a finished stage: WORK_DIR/stage_K')
    parser.add_argument('images', type=Path, nargs='+', help='image files, or folders of images')
    parser.add_argument('--out', type=Path, help='where to write (default: STAGE_DIR/predictions)')
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='where the model runs (default: the GPU, if there is one)',
    )
    return parser.parse_args()


def find_images(given: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each image with the name of its overlay, all different.

    Args:
        given: files, taken whatever their suffix, and folders, of which the images are taken.
    """
    found, names = [], set()
    for place in given:
        paths = [place]
        if place.is_dir():
            paths = sorted(p for p in place.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
        for path in paths:
            name, number = path.stem, 2
            while name in names:
                name, number = f'{path.stem}_{number}', number + 1
            names.add(name)
            found.append((path, f'{name}.png'))
    return found


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, BGR.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    try:
        image = mmcv.imfrombytes(path.read_bytes(), flag='color')
    except (OSError, cv2.error) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    if image is None:
        raise ValueError(f'{path} is no image, or a broken one')
    return image


def predict(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """The overlay of one image, see :func:`draw_overlay`."""
    labels = inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()
    meta = model.dataset_meta
    return draw_overlay(image, labels, meta['classes'], meta['palette'])


def main() -> int:
    """Writes an overlay per image; returns 1 if an image could not be read."""
    args = parse_args()
    try:
        model = load_for_export(args.stage_dir)[1]
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    try:
        model = model.to(args.device)
    except (AssertionError, RuntimeError) as error:  # torch's messages about a device that does not exist
        raise SystemExit(f'--device {args.device}: {error}') from error
    images = find_images(args.images)
    if not images:
        raise SystemExit(f'no images in {", ".join(map(str, args.images))}')
    out = args.out or args.stage_dir / 'predictions'
    out.mkdir(parents=True, exist_ok=True)
    console, failed = Console(stderr=True), 0
    for path, name in track(images, description='predicting', console=console):
        try:
            overlay = predict(model, read_image(path))
        except ValueError as error:
            failed += 1
            console.print(str(error), style='red', markup=False, soft_wrap=True)
            continue
        _write_png(out / name, overlay)
    written = f'overlays in {out}' if failed < len(images) else 'nothing written'
    print(f'{len(images) - failed} of {len(images)} images: {written}')
    return 1 if failed else 0


def _write_png(path: Path, picture: np.ndarray) -> None:
    png = cv2.imencode('.png', picture)[1].tobytes()
    write_atomically(path, lambda file: file.write(png))


if __name__ == '__main__':
    sys.exit(main())
