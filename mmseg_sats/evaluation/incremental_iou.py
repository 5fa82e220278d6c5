# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""IoU of the base classes, of the classes learned later, and of all of them."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger, print_log
from mmseg.registry import METRICS
from prettytable import PrettyTable
from torch import Tensor

# Predictions have the size of the image file, and so must labels.
_ORDER = 'expected LoadAnnotations in the transforms of the evaluation, behind Resize'


@METRICS.register_module()
class IncrementalIoUMetric(BaseMetric):
    """Mean IoU over base, new and all classes, and their harmonic mean.

    The labels must already be those of the stage: channel ``i`` is the i-th class learned, and
    what counts as background or is ignored has been decided by the data set. Areas are summed
    over the images before the division, as in mmseg's ``IoUMetric``. A class that no labelled pixel
    shows is left out of every mean, whatever is predicted, so that all methods are averaged over
    the same classes.

    Args:
        num_base: Number of base labels, background included. None takes it from
            ``dataset_meta['num_base']``.
        ignore_index: Label of the pixels that do not count, whatever is predicted there.
        collect_device: How mmengine gathers the results of the ranks: 'gpu', by messages (without a
            GPU too), or 'cpu', by files in a folder that all of them share.
        prefix: Put before every key, as ``prefix/key``.

    Raises:
        ValueError: If ``num_base`` is smaller than 1.
    """

    def __init__(
        self,
        num_base: int | None = None,
        ignore_index: int = 255,
        collect_device: str = 'gpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if num_base is not None and num_base < 1:
            raise ValueError(f'num_base counts background, so it is at least 1, got {num_base}')
        self.num_base = num_base
        self.ignore_index = ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep the (3, K) area counts of every image of a batch.

        Args:
            data_batch: Not used.
            data_samples: One dict per image, with ``pred_sem_seg`` and ``gt_sem_seg``, each
                holding ``data`` of shape (1, H, W).

        Raises:
            ValueError: If an image has no label, prediction and label differ in shape, or hold a label that no
                class has. The message names the image.
        """
        num_channels = len(self._meta()['classes'])
        for sample in data_samples:
            name = sample.get('img_path', 'unnamed image')
            if 'gt_sem_seg' not in sample:
                raise ValueError(f'{name} has no label: {_ORDER}')
            try:
                # One result per image, never one per batch: the gathering across ranks drops
                # the sampler's padding by counting results.
                counts = self.area_counts(
                    sample['pred_sem_seg']['data'].squeeze(0),
                    sample['gt_sem_seg']['data'].squeeze(0),
                    num_channels,
                    self.ignore_index,
                )
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from error
            self.results.append(counts)

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Turn the counts of all images into percentages, and log them as a table.

        Args:
            results: Per image an int64 array (3, K), see :meth:`area_counts`.

        Returns:
            ``mIoU_base``, ``mIoU_new``, ``mIoU_all``, ``hIoU``, ``mIoU`` (the same as
            ``mIoU_all``) and ``IoU.<class name>`` per class. Percent, not rounded; NaN where
            there is no value: a class without a labelled pixel, or ``mIoU_new`` before anything new
            is learned. ``classes_base``, ``classes_new`` and ``classes_all`` are the numbers of
            classes that the means go over.
        """
        classes = self._meta()['classes']
        num_base = self._resolve_num_base(len(classes))
        iou = self.ious(sum(results, np.zeros((3, len(classes)), dtype=np.int64)))
        metrics = OrderedDict(self.summary(iou, num_base) | self.counted(iou, num_base))
        self._log_table(classes, iou, metrics, num_base)
        for name, value in zip(classes, iou, strict=True):
            metrics[f'IoU.{name}'] = float(value)
        return metrics

    @staticmethod
    def confusion(
        pred: Tensor, label: Tensor, num_channels: int, ignore_index: int = 255
    ) -> np.ndarray:
        """Count, for each class, the pixels that are predicted as each class.

        Args:
            pred: Predicted classes, integer, any shape, on any device.
            label: True classes, integer, the same shape; ``ignore_index`` where unknown.
            num_channels: K, background included.
            ignore_index: Pixels with this label are not counted, not in the prediction either.

        Returns:
            int64 array (K, K): the row is the label, the column the prediction.

        Raises:
            ValueError: If the shapes differ, or a counted pixel lies outside 0..K-1.
        """
        if pred.shape != label.shape:
            raise ValueError(
                f'prediction has shape {tuple(pred.shape)}, its label {tuple(label.shape)}: {_ORDER}'
            )
        label = label.to(device=pred.device, dtype=torch.long)
        valid = label != ignore_index
        pred, label = pred[valid].long(), label[valid]
        for name, values in (('prediction', pred), ('label', label)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_channels:
                raise ValueError(
                    f'{name} holds values from {int(values.min())} to {int(values.max())}, '
                    f'expected 0..{num_channels - 1} (or {ignore_index}, ignored, in the label)'
                )
        confusion = torch.bincount(label * num_channels + pred, minlength=num_channels**2)
        return confusion.view(num_channels, num_channels).cpu().numpy()

    @staticmethod
    def areas(confusion: np.ndarray) -> np.ndarray:
        """The pixels of intersection, prediction and label of each class, (3, K), of a confusion (K, K)."""
        return np.stack((confusion.diagonal(), confusion.sum(0), confusion.sum(1)))

    @classmethod
    def area_counts(
        cls, pred: Tensor, label: Tensor, num_channels: int, ignore_index: int = 255
    ) -> np.ndarray:
        """Count, for each class, the pixels of intersection, prediction and label.

        Args:
            pred: As for :meth:`confusion`.
            label: As for :meth:`confusion`.
            num_channels: K, background included.
            ignore_index: As for :meth:`confusion`.

        Returns:
            int64 array (3, K): rows intersection, prediction, label.

        Raises:
            ValueError: As :meth:`confusion` does.
        """
        return cls.areas(cls.confusion(pred, label, num_channels, ignore_index))

    @staticmethod
    def ious(counts: np.ndarray) -> np.ndarray:
        """Intersection over union of each class.

        Args:
            counts: (3, K), summed over the images, see :meth:`area_counts`.

        Returns:
            float64 array (K,), percent; NaN for a class that no labelled pixel shows.
        """
        intersection, predicted, labelled = np.asarray(counts, dtype=np.float64)
        union = predicted + labelled - intersection
        iou = np.full(union.shape, np.nan)
        return np.divide(100 * intersection, union, out=iou, where=labelled > 0)

    @staticmethod
    def summary(iou: np.ndarray, num_base: int) -> dict[str, float]:
        """Means over base, new and all classes; absent (NaN) classes are left out.

        Args:
            iou: (K,), percent.
            num_base: The first ``num_base`` channels are the base classes.

        Returns:
            ``mIoU_base``, ``mIoU_new``, ``mIoU_all``, ``hIoU`` and ``mIoU``, percent. ``hIoU``
            is the harmonic mean of base and new: 0 when both are 0, NaN when either is.
        """
        base, new, total = (_mean(part) for part in (iou[:num_base], iou[num_base:], iou))
        # base + new is NaN, and so unequal to 0, where either has no value.
        harmonic = 0.0 if base + new == 0 else 2 * base * new / (base + new)
        return dict(mIoU_base=base, mIoU_new=new, mIoU_all=total, hIoU=harmonic, mIoU=total)

    @staticmethod
    def counted(iou: np.ndarray, num_base: int) -> dict[str, int]:
        """Over how many classes each mean of :meth:`summary` goes.

        Args:
            iou: (K,), percent; NaN for an absent class.
            num_base: The first ``num_base`` channels are the base classes.

        Returns:
            ``classes_base``, ``classes_new`` and ``classes_all``.
        """
        there = ~np.isnan(iou)
        base, new = int(there[:num_base].sum()), int(there[num_base:].sum())
        return dict(classes_base=base, classes_new=new, classes_all=base + new)

    def _meta(self) -> dict:
        """``dataset_meta``, or an error that says what is missing."""
        meta = self.dataset_meta
        if not meta or 'classes' not in meta:
            raise ValueError(
                "IncrementalIoUMetric needs dataset_meta with 'classes', got "
                f'{None if meta is None else sorted(meta)}'
            )
        return meta

    def _resolve_num_base(self, num_channels: int) -> int:
        """Number of base labels: the argument, or else the data set's own."""
        num_base = self.num_base
        if num_base is None:
            num_base = self._meta().get('num_base')
        if num_base is None:
            raise ValueError(
                'IncrementalIoUMetric needs the number of base labels (background included): '
                "give num_base, or a data set whose metainfo has 'num_base'"
            )
        if not 1 <= num_base <= num_channels:
            raise ValueError(
                f'num_base is {num_base}, expected 1..{num_channels}: the data set has '
                f'{num_channels} classes, background included'
            )
        return num_base

    @staticmethod
    def _log_table(
        classes: Sequence[str], iou: np.ndarray, means: dict[str, float], num_base: int
    ) -> None:
        """Log one row per class, then one per mean."""
        table = PrettyTable(['class', 'IoU', 'group'])
        for channel, (name, value) in enumerate(zip(classes, iou, strict=True)):
            table.add_row([name, _shown(value), 'base' if channel < num_base else 'new'])
        summary = PrettyTable(['base', 'new', 'all', 'hIoU'])
        keys = ('mIoU_base', 'mIoU_new', 'mIoU_all', 'hIoU')
        summary.add_row([_shown(means[key]) for key in keys])
        absent = [name for name, value in zip(classes, iou, strict=True) if np.isnan(value)]
        note = (
            f'\nthe means go over {means["classes_all"]} of {len(classes)} classes: no evaluation '
            f'pixel shows {", ".join(absent)}'
            if absent
            else ''
        )
        logger = MMLogger.get_current_instance()
        print_log(f'per class results:\n{table}\n{summary}{note}', logger=logger)


def _shown(value: float) -> str:
    return '-' if np.isnan(value) else f'{value:.2f}'


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are there, NaN if there are none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float('nan')
