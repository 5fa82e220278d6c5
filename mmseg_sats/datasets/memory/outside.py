# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Unlabelled images from outside the data set, which are replayed with labels from models."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations
from mmengine.dataset import BaseDataset, Compose
from mmseg.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

from mmseg_sats.datasets.folder import IMAGE_SUFFIXES


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """All images of a folder and the folders in it, in the order of their names.

    Args:
        root: the folder.
        suffixes: endings that make a file an image, in any case.
        **kwargs: ``pipeline``, ``indices``, ``lazy_init`` and so on of mmengine's ``BaseDataset``.

    Raises:
        ValueError: no folder is named, or it holds no image.
        FileNotFoundError: the folder does not exist.
    """

    def __init__(
        self, root: str | None, suffixes: Sequence[str] = IMAGE_SUFFIXES, **kwargs: Any
    ) -> None:
        if not root:
            raise ValueError(
                'no folder of outside images is named: set outside_root=FOLDER (of --cfg-options)'
            )
        if not os.path.isdir(root):
            raise FileNotFoundError(f'outside_root={root}: no such folder of images')
        self.suffixes = tuple(suffix.lower() for suffix in suffixes)
        if not any(self._is_image(path) for path in Path(root).rglob('*')):
            raise ValueError(
                f'outside_root={root} holds no image; expected files that end in {list(suffixes)}'
            )
        super().__init__(data_prefix=dict(img_path=str(root)), **kwargs)

    def _is_image(self, path: Path) -> bool:
        return path.suffix.lower() in self.suffixes

    def load_data_list(self) -> list[dict]:
        """One entry per image, with mmseg's keys and no ``seg_map_path``."""
        paths = sorted(path for path in Path(self.data_prefix['img_path']).rglob('*'))
        return [
            dict(img_path=str(path), label_map=None, reduce_zero_label=False, seg_fields=[])
            for path in paths
            if self._is_image(path)
        ]


@TRANSFORMS.register_module()
class Unlabelled(BaseTransform):
    """Adds a segmentation map with only background, in place of annotations.

    Required Keys:

    - img

    Added Keys:

    - gt_seg_map (np.uint8)
    - seg_fields (List)
    """

    def transform(self, results: dict) -> dict:
        """Adds the map, so that what follows pads and crops it along with the image."""
        results['gt_seg_map'] = np.zeros(results['img'].shape[:2], dtype=np.uint8)
        results['seg_fields'] = ['gt_seg_map']
        return results


@DATASETS.register_module()
class OutsideDataset(Dataset):
    """The images of any data set, without reading their labels.

    Args:
        dataset: config of an :class:`ImageFolder` or of any mmseg dataset; where ``dataset`` has
            masks they are not opened.
        pipeline: configs of the training transforms; :class:`Unlabelled` takes the place of
            ``LoadAnnotations``.
        lazy_init: whether to leave listing the images to :meth:`full_init`.
    """

    def __init__(
        self, dataset: Mapping[str, Any], pipeline: Sequence[dict], lazy_init: bool = False
    ) -> None:
        cfg = dict(copy.deepcopy(dataset), pipeline=[], lazy_init=True)
        self.dataset: BaseDataset = DATASETS.build(cfg)
        self.pipeline = Compose([TRANSFORMS.build(cfg) for cfg in _without_labels(pipeline)])
        if not lazy_init:
            self.full_init()

    def full_init(self) -> None:
        """Lists the images."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict:
        """The idx-th image after the pipeline; another one if a transform returns None."""
        for _ in range(self.dataset.max_refetch + 1):
            info = self.dataset.get_data_info(idx)
            info.pop('seg_map_path', None)
            data = self.pipeline(info)
            if data is not None:
                return data
            idx = int(np.random.randint(len(self)))
        raise RuntimeError(f'the pipeline gave None for {self.dataset.max_refetch + 1} images')


def _without_labels(pipeline: Any) -> Any:
    """A copy of the transforms' configs with every loader of annotations replaced, nested ones too."""
    if isinstance(pipeline, Mapping):
        kind = pipeline.get('type')
        transform = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
        if isinstance(transform, type) and issubclass(transform, LoadAnnotations):
            return dict(type='Unlabelled')
        return {key: _without_labels(value) for key, value in pipeline.items()}
    if isinstance(pipeline, list | tuple):
        return type(pipeline)(_without_labels(item) for item in pipeline)
    return pipeline
