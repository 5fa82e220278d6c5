# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""``shapes``, the embedded data set: drawn scenes (see ``drawing.py``), kept as ordinary files."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from mmengine.dist import barrier, is_main_process
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from mmseg_sats.datasets.shapes.drawing import (
    DRAWING_VERSION,
    MAX_CLASSES,
    SPLITS,
    class_names,
    class_palette,
    draw_scene,
)
from mmseg_sats.utils.spelling import check_choice


def draw_split(
    folder: Path, num_images: int, draw: Callable[[int], tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write ``images/*.png`` and ``masks/*.png`` below a folder, all or nothing.

    The files are drawn next to it and moved into place when all are there. Where another process
    was faster, its folder stays.

    Args:
        folder: To be made; not an error where it is there already.
        num_images: Scenes 0..num_images-1 are drawn.
        draw: index -> BGR image and mask.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as temporary:
        # One level down: the temporary folder itself is readable by its owner alone.
        drawn = Path(temporary, folder.name)
        for part in ('images', 'masks'):
            (drawn / part).mkdir(parents=True)
        for index in range(num_images):
            for part, array in zip(('images', 'masks'), draw(index), strict=True):
                _write_png(drawn / part / _file_name(index), array)
        try:
            os.rename(drawn, folder)
        except OSError:
            # Renaming onto a folder with something in it fails: another process was first.
            if not folder.is_dir():
                raise


def check_split(folder: Path, num_images: int) -> None:
    """Raise FileNotFoundError unless a drawn folder holds exactly the scenes 0..num_images-1."""
    expected = {_file_name(index) for index in range(num_images)}
    for part in ('images', 'masks'):
        found = {path.name for path in (folder / part).glob('*.png')}
        if found != expected:
            raise FileNotFoundError(
                f'{folder / part} should hold {_file_name(0)} to {_file_name(num_images - 1)}, '
                f'but {len(expected - found)} are missing and {len(found - expected)} do not '
                f'belong there; remove {folder}, and it will be drawn anew'
            )


def _file_name(index: int) -> str:
    return f'{index:05d}.png'


def _write_png(path: Path, array: np.ndarray) -> None:
    if not cv2.imwrite(str(path), array, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f'cannot write {path}')


@DATASETS.register_module()
class ShapesDataset(BaseSegDataset):
    """Drawn scenes with 1..200 classes of textured shapes, as ordinary image files.

    What is missing is drawn when the data set is initialised (at once, unless ``lazy_init``),
    into ``data_root/<parameters>/<split>/{images,masks}``; the folder's name holds everything
    that the drawing depends on, so data sets with other parameters stand side by side. In a
    distributed run rank 0 draws and the others wait, so all ranks must initialise it.

    ``metainfo`` has the ``classes``, background first, and their ``palette``.

    Args:
        data_root: Folder for all drawn data sets.
        split: 'train' or 'val'.
        num_classes: Shape classes, 1..200, without background.
        num_images: Scenes in this split; the first n are the same for any number.
        image_size: Height and width in pixels, 32 at least.
        seed: Not negative; another seed gives other scenes.
        classes_per_image: Smallest and largest number of different classes in a scene.
        pipeline: As in mmseg's ``BaseSegDataset``, like everything below.
        indices: Use only the first so many, or these.
        serialize_data: Keep the list of files as bytes shared by the workers.
        test_mode: Whether this is for validation or test.
        lazy_init: Wait with drawing and listing for ``full_init()``.
        max_refetch: Further tries when a pipeline gives None.
        ignore_index: Of the labels; the masks themselves never hold it.

    Raises:
        ValueError: If an argument lies outside its range.
        FileNotFoundError: If a folder drawn earlier has lost files.
    """

    def __init__(
        self,
        data_root: str = 'data/shapes',
        split: str = 'train',
        num_classes: int = 6,
        num_images: int = 240,
        image_size: int = 96,
        seed: int = 0,
        classes_per_image: tuple[int, int] = (1, 3),
        pipeline: Sequence[dict | Callable] = (),
        indices: int | Sequence[int] | None = None,
        serialize_data: bool = True,
        test_mode: bool = False,
        lazy_init: bool = False,
        max_refetch: int = 1000,
        ignore_index: int = 255,
    ) -> None:
        low, high = classes_per_image
        check_choice('split', split, SPLITS)
        _check_range('num_classes', num_classes, 1, MAX_CLASSES)
        _check_range('num_images', num_images, 1, 99999)
        _check_range('image_size', image_size, 32, 4096)
        _check_range('seed', seed, 0, 2**32 - 1)
        _check_range('classes_per_image[1]', high, 1, 10)
        _check_range('classes_per_image[0]', low, 1, high)
        self.num_images = num_images
        self.drawing = dict(
            split=split,
            num_classes=num_classes,
            image_size=image_size,
            seed=seed,
            classes_per_image=(low, high),
        )
        key = (
            f'v{DRAWING_VERSION}_classes{num_classes}_per-image{low}-{high}_size{image_size}'
            f'_seed{seed}_images{num_images}'
        )
        super().__init__(
            metainfo=dict(classes=class_names(num_classes), palette=class_palette(num_classes)),
            data_root=str(Path(data_root, key, split)),
            data_prefix=dict(img_path='images', seg_map_path='masks'),
            img_suffix='.png',
            seg_map_suffix='.png',
            pipeline=list(pipeline),
            indices=indices,
            serialize_data=serialize_data,
            test_mode=test_mode,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
            ignore_index=ignore_index,
        )

    def load_data_list(self) -> list[dict]:
        """Draw what is missing, then list the files as ``BaseSegDataset`` does."""
        folder = Path(self.data_root)
        try:
            if is_main_process():
                self._draw_missing(folder)
        finally:
            # Reached even when drawing fails, or the other ranks would wait for ever.
            barrier()
        # A rank on another machine may not see the files of rank 0.
        self._draw_missing(folder)
        check_split(folder, self.num_images)
        return super().load_data_list()

    def _draw_missing(self, folder: Path) -> None:
        """Draw the split unless its folder is there."""
        if not folder.is_dir():
            draw_split(folder, self.num_images, lambda index: draw_scene(index, **self.drawing))


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f'{name} of ShapesDataset is a whole number in {low}..{high}, got {value!r}'
        )
