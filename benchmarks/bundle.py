# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Puts into one folder what benchmarks/on_gpu.sh needs on a machine with a GPU and without internet.

That is wheels, some photographs of voc_mini and the encoder's weights (docs/data.md).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
WHEELS = (
    'onedl-mmengine', 'onedl-mmcv', 'onedl-mmsegmentation', 'addict', 'ftfy', 'platformdirs', 'prettytable',
    'termcolor', 'wcwidth', 'yapf',
)  # fmt: skip
"""What a machine with torch, OpenCV, matplotlib, scipy, pytest, pytest-xdist and rich lacks."""
FITTING = r'-py3-none-any\.whl$|-py2\.py3-none-any\.whl$|-abi3-manylinux.*x86_64\.whl$'
LIMIT_MIB = 60
"""Of the 64 that may be carried: the project itself needs some."""
IGNORED = {0, 255}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for option, default in (('voc-mini', 'data/voc_mini'), ('mit-b0', 'weights/mit_b0.pth')):
        variable = option.upper().replace('-', '_')
        path = os.environ.get(variable, SHARED / default)
        parser.add_argument(f'--{option}', type=Path, default=path, help=f'default: ${variable}, or {path}')
    parser.add_argument('--train', type=int, default=500, help='training images (default: 500)')
    parser.add_argument('--val', type=int, default=150, help='images to evaluate (default: 150)')
    parser.add_argument('--out', type=Path, default=ROOT / 'gpu_bundle', help='a new folder')
    args = parser.parse_args(argv)
    for option in ('voc_mini', 'mit_b0'):
        path = getattr(args, option)
        if not path.exists():
            parser.error(f'{path} does not exist: name it by --{option.replace("_", "-")} or ${option.upper()}')
    if args.out.exists():
        parser.error(f'--out: {args.out} exists, expected a new folder')
    try:
        for split, number in (('train', args.train), ('val', args.val)):
            copy_images(args.voc_mini, args.out / 'voc_mini', split, number)
        shutil.copy(args.mit_b0, args.out / 'mit_b0.pth')
        build_wheels(args.out / 'wheels')
        print(f'{args.out}: {weigh(args.out)}')
    except (ValueError, subprocess.CalledProcessError) as error:
        shutil.rmtree(args.out, ignore_errors=True)
        parser.error(str(error))
    return 0


def copy_images(source: Path, target: Path, split: str, number: int) -> None:
    """Copies ``number`` images of a list with their masks, and writes the list of them.

    Raises:
        ValueError: they are too few for every class to be among them.
    """
    names = (source / f'ImageSets/Segmentation/{split}.txt').read_text().split()
    classes = {name: classes_in(source / f'SegmentationClass/{name}.png') for name in names}
    names = choose(classes, number)
    files = [f'JPEGImages/{name}.jpg' for name in names] + [f'SegmentationClass/{name}.png' for name in names]
    list_file = target / f'ImageSets/Segmentation/{split}.txt'
    for path in (list_file, *(target / file for file in files)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(source / file, target / file)
    list_file.write_text('\n'.join(names) + '\n')


def classes_in(mask: Path) -> set[int]:
    """The classes of a palette PNG, without background and ignored pixels."""
    with Image.open(mask) as image:
        return set(np.unique(np.asarray(image)).tolist()) - IGNORED


def choose(classes: Mapping[str, set[int]], number: int) -> list[str]:
    """``number`` of the images in their order: for one class after the other the next image, and so on.

    Raises:
        ValueError: there are more classes than ``number``.
    """
    labels = sorted(set().union(*classes.values()))
    if number < len(labels):
        raise ValueError(f'{number} images, expected at least one for each of the {len(labels)} classes')
    queues = [[name for name in classes if label in classes[name]] for label in labels]
    chosen: set[str] = set()
    while any(queues) and len(chosen) < number:
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < number:
                chosen.add(queue.pop(0))
    return [name for name in classes if name in chosen]


def build_wheels(folder: Path) -> None:
    """The tested versions of ``WHEELS``, built where the index has none.

    Raises:
        ValueError: one fits only this machine's Python, or its processor where that is not x86-64.
    """
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '-q', '--no-deps')
    subprocess.run([*pip, '-c', str(ROOT / 'requirements/constraints.txt'), '-w', str(folder), *WHEELS], check=True)
    bound = [path.name for path in folder.iterdir() if not re.search(FITTING, path.name)]
    if bound:
        raise ValueError(f'{", ".join(bound)}: expected wheels for any Python 3, and any machine or x86-64')


def weigh(folder: Path) -> str:
    """What the bundle weighs, in words.

    Raises:
        ValueError: it is heavier than ``LIMIT_MIB``.
    """
    parts = {part.name: sum(file.stat().st_size for file in [part, *part.rglob('*')] if file.is_file()) / 2**20
             for part in sorted(folder.iterdir())}  # fmt: skip
    words = f'{sum(parts.values()):.1f} MiB ({", ".join(f"{name} {size:.1f}" for name, size in parts.items())})'
    if sum(parts.values()) > LIMIT_MIB:
        raise ValueError(f'{words}, expected at most {LIMIT_MIB}: take fewer images (--train, --val)')
    return words


if __name__ == '__main__':
    sys.exit(main())
