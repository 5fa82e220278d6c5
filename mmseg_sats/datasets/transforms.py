# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Relabelling of masks: annotation ids to the output channels of a stage, by one table look-up."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from mmseg_sats.protocol import SETTINGS, Protocol
from mmseg_sats.utils.spelling import check_choice

MODES = ('train', 'eval', 'memory')
EVAL_FUTURES = ('background', 'ignore')


def relabel_table(
    protocol: Protocol,
    stage_index: int,
    mode: str = 'train',
    setting: str = 'overlapped',
    eval_future: str = 'background',
    ignore_index: int = 255,
) -> np.ndarray:
    """What each annotation id becomes at one stage.

    In training only the new classes keep their labels; in the sequential setting the old classes do
    too, but never the future classes. In evaluation and on exemplars every seen class keeps its label;
    on exemplars future classes are background.

    Args:
        protocol: The protocol.
        stage_index: Number of the stage.
        mode: ``'train'``, ``'eval'`` or ``'memory'``.
        setting: ``'overlapped'``, ``'disjoint'``, ``'sequential'`` or ``'partitioned'``; only matters in
            training.
        eval_future: What future classes become in evaluation, ``'background'`` or ``'ignore'``.
        ignore_index: The ignored label, which stays as it is.

    Returns:
        (256,) uint8: ``table[id]`` is the channel of annotation id ``id``, 0 or ``ignore_index``.
        Ids that the data set cannot hold lead to ``ignore_index``.

    Raises:
        ValueError: If an option is unknown, the stage does not exist or ``ignore_index`` is not
            above the last class id and at most 255.
    """
    check_choice('mode', mode, MODES)
    check_choice('setting', setting, SETTINGS)
    check_choice('eval_future', eval_future, EVAL_FUTURES)
    if not protocol.num_classes < ignore_index <= 255:
        raise ValueError(
            f'ignore_index={ignore_index} must be above the last of the {protocol.num_classes} '
            'class ids and at most 255: masks have 8 bits'
        )
    stage = protocol.stage(stage_index)
    table = np.full(256, ignore_index, dtype=np.uint8)
    table[: protocol.num_classes + 1] = 0
    visible = stage.new if mode == 'train' and setting != 'sequential' else stage.seen
    channels = protocol.channels(stage)
    for class_id in visible:
        table[class_id] = channels[class_id]
    if mode == 'eval' and eval_future == 'ignore':
        table[list(stage.future)] = ignore_index
    return table


def through_label_ids(
    table: np.ndarray, label_ids: Mapping[int, int] | None, ignore_index: int = 255
) -> np.ndarray:
    """The table for masks that number their classes in their own way.

    Args:
        table: (256,) uint8, see :func:`relabel_table`.
        label_ids: Number in the masks to class id; None: every number is its class.
        ignore_index: What numbers without a class become, and what ``table`` leaves as it is.

    Returns:
        (256,) uint8: what each number in the masks becomes.
    """
    if label_ids is None:
        return table
    result = np.full(256, ignore_index, dtype=np.uint8)
    for value, class_id in label_ids.items():
        result[value] = table[class_id]
    return result


@TRANSFORMS.register_module()
class RelabelSegMap(BaseTransform):
    """Replace every label of the segmentation map by its entry in a look-up table.

    ``IncrementalDataset`` puts it directly behind ``LoadAnnotations``, before anything that looks
    at labels: ``RandomCrop(cat_max_ratio)`` would otherwise choose its crops by labels which the
    stage does not have.

    Required Keys:

    - gt_seg_map (np.uint8)

    Modified Keys:

    - gt_seg_map (np.uint8)

    Args:
        table (Sequence[int]): 256 entries of 0 to 255; entry i replaces label i.

    Raises:
        ValueError: If ``table`` has not 256 entries of 0 to 255.
    """

    def __init__(self, table: Sequence[int]) -> None:
        values = np.asarray(table)
        if values.shape != (256,) or values.dtype.kind not in 'iu':
            raise ValueError(
                'RelabelSegMap: table must be 256 whole numbers, got shape '
                f'{values.shape} of {values.dtype}'
            )
        if values.min() < 0 or values.max() > 255:
            raise ValueError(
                'RelabelSegMap: table entries must be 0 to 255, got '
                f'{values.min()} to {values.max()}'
            )
        self.table = values.astype(np.uint8)

    def transform(self, results: dict) -> dict:
        """Relabel ``results['gt_seg_map']``.

        Args:
            results: Result dict; ``gt_seg_map`` is (H, W) uint8.

        Returns:
            The same dict with a new ``gt_seg_map`` of the same shape and type.

        Raises:
            KeyError: If there is no ``gt_seg_map``.
            TypeError: If it is not uint8.
        """
        if 'gt_seg_map' not in results:
            raise KeyError("RelabelSegMap needs 'gt_seg_map': put it behind LoadAnnotations")
        seg = results['gt_seg_map']
        if seg.dtype != np.uint8:
            raise TypeError(f'RelabelSegMap: gt_seg_map must be uint8, got {seg.dtype}')
        # A third of the time of numpy's table[seg]; the reshape undoes OpenCV's extra axis on the
        # one-dimensional map that LoadAnnotations makes of a mask one pixel high or wide.
        results['gt_seg_map'] = cv2.LUT(seg, self.table).reshape(seg.shape)
        return results

    def __repr__(self) -> str:
        return f'{self.__class__.__name__}(table={self.table.tolist()})'


@TRANSFORMS.register_module()
class EvaluateAsIs(BaseTransform):
    """Compare prediction and label at the size that the pipeline has made, not at the file's.

    mmseg resizes every prediction to the file's size. After ``Resize`` and ``CenterCrop``, if both come
    after ``LoadAnnotations``, the labels have a different size: the one that the published figures use.

    Required Keys:

    - img_shape

    Modified Keys:

    - ori_shape
    """

    def transform(self, results: dict) -> dict:
        """Let the present size count as the original one."""
        results['ori_shape'] = results['img_shape']
        return results
