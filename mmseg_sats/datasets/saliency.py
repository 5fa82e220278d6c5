# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Marks the salient part of the background as SSUL's unknown class in the training labels."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from mmseg_sats.protocol import UNKNOWN_LABEL
from mmseg_sats.utils.spelling import check_choice

_SIDE = 64


def spectral_residual(image: np.ndarray) -> np.ndarray:
    """Saliency of an image: what its amplitude spectrum has beyond its own local mean.

    Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, eq. (1) to (5), at
    the 64 pixels that the paper found right for any image.

    Args:
        image: (H, W, 3) uint8 BGR, (H, W) of one band, or (H, W, C) of any others, whose mean is taken.

    Returns:
        (H, W) float32, not negative; 0 for an image of one colour.
    """
    if image.ndim == 3 and image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    grey = image if image.ndim == 2 else image.mean(axis=2, dtype=np.float32)
    height, width = grey.shape
    scale = _SIDE / min(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.min() == small.max():
        return np.zeros_like(grey, dtype=np.float32)
    spectrum = np.fft.fft2(small)
    log_amplitude = np.log(np.abs(spectrum) + 1e-8).astype(np.float32)
    residual = log_amplitude - cv2.blur(log_amplitude, (3, 3))
    saliency = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    smooth = cv2.GaussianBlur(saliency.astype(np.float32), (0, 0), 2.5)
    return np.maximum(cv2.resize(smooth, (width, height)), 0)


def _salient_by_spectral_residual(image: np.ndarray) -> np.ndarray:
    """Where the saliency exceeds its mean, (H, W) bool.

    The paper's three times the mean looks for the seed of an object; on VOC it would leave the unknown
    class 4 % of the pixels and 7 % of those of objects, where the mean gives 35 % and 49 %.
    """
    saliency = spectral_residual(image)
    return saliency > saliency.mean()


_COMPUTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'spectral_residual': _salient_by_spectral_residual,
    'everything': lambda image: np.ones(image.shape[:2], dtype=bool),
}
SALIENCIES = ('folder', *_COMPUTED)


@TRANSFORMS.register_module()
class MarkUnknown(BaseTransform):
    """Turn the salient part of the background into the unknown class of SSUL.

    ``IncrementalDataset(label_transforms=...)`` puts it directly behind the relabelling, where the
    image still has its own size; whatever scales, crops and flips the labels later does so with the
    unknown ones. (``RandomCrop(cat_max_ratio)`` counts unknown as a class of its own.)

    Required Keys:

    - img (with ``saliency='folder'``: img_path)
    - gt_seg_map (np.uint8)

    Modified Keys:

    - gt_seg_map: ``UNKNOWN_LABEL`` (254) where it was 0 and the image is salient

    Args:
        saliency (str): ``'folder'``: maps from files, one PNG with the image's name per image, as
            SSUL's authors ship them, salient where not 0; ``'spectral_residual'``: computed by
            :func:`spectral_residual`; ``'everything'``: all background is unknown, as SSUL does
            on ADE20K.
        folder (str, optional): The maps' folder.

    Raises:
        ValueError: If ``saliency`` is unknown, or lacks or does not use ``folder``.
        FileNotFoundError: If ``folder`` does not exist.
    """

    def __init__(self, saliency: str = 'spectral_residual', folder: str | None = None) -> None:
        check_choice('saliency', saliency, SALIENCIES)
        if (saliency == 'folder') != (folder is not None):
            raise ValueError(
                f"MarkUnknown: saliency='folder' goes with a folder of maps, and no other does; "
                f'got saliency={saliency!r}, folder={folder!r}'
            )
        if folder is not None and not os.path.isdir(folder):
            raise FileNotFoundError(f'MarkUnknown: the folder of saliency maps {folder} does not exist')
        self.saliency = saliency
        self.folder = folder

    def check_images(self, paths: Iterable[str]) -> None:
        """Find out before training whether every image has its map.

        Args:
            paths: The images.

        Raises:
            FileNotFoundError: If a map is missing; the message names it.
        """
        if self.folder is None:
            return
        there = set(os.listdir(self.folder))
        missing = [path for path in map(self._map_of, paths) if path.name not in there]
        if missing:
            raise FileNotFoundError(
                f'MarkUnknown: saliency map {missing[0]} does not exist '
                f'({len(missing)} missing in all)'
            )

    def transform(self, results: dict) -> dict:
        """Mark the unknown pixels in ``results['gt_seg_map']``.

        Args:
            results: Result dict; ``img`` is (H, W, 3) uint8, ``gt_seg_map`` (H, W) uint8.

        Returns:
            The same dict with a new ``gt_seg_map``.

        Raises:
            KeyError: If there is no ``img`` or ``gt_seg_map``.
            FileNotFoundError: If the image has no map.
            ValueError: If saliency and labels have different sizes.
        """
        for key in ('img', 'gt_seg_map'):
            if key not in results:
                raise KeyError(
                    f'MarkUnknown needs {key!r}: put it behind LoadImageFromFile and LoadAnnotations'
                )
        labels = results['gt_seg_map']
        salient = self._salient(results)
        if salient.shape != labels.shape:
            raise ValueError(
                f'MarkUnknown: {self.saliency} saliency of {results.get("img_path")} is of size '
                f'{salient.shape}, its labels are {labels.shape}'
            )
        results['gt_seg_map'] = np.where((labels == 0) & salient, np.uint8(UNKNOWN_LABEL), labels)
        return results

    def _salient(self, results: dict) -> np.ndarray:
        if self.folder is None:
            return _COMPUTED[self.saliency](results['img'])
        path = self._map_of(results['img_path'])
        if not path.is_file():
            raise FileNotFoundError(f'MarkUnknown: saliency map {path} does not exist')
        # Pillow gives a palette's numbers, not its colours.
        values = mmcv.imread(str(path), flag='unchanged', backend='pillow')
        return values.reshape(*values.shape[:2], -1).any(axis=2)

    def _map_of(self, img_path: str) -> Path:
        return Path(self.folder) / f'{Path(img_path).stem}.png'

    def __repr__(self) -> str:
        return f'{self.__class__.__name__}(saliency={self.saliency!r}, folder={self.folder!r})'
