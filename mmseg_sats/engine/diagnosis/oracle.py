# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""What a model's features still tell apart: a classifier on them that is fitted to the true labels of all seen classes.

It is an oracle: no stage has these labels. And it is a lower bound: another classifier may tell more apart.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_sats.datasets.incremental_dataset import IncrementalDataset
from mmseg_sats.engine.diagnosis.classifier_rows import NotMeasurableError, check_linear
from mmseg_sats.functional.features.ridge import ridge_rows, ridge_sums
from mmseg_sats.models.padding import with_padding
from mmseg_sats.models.segmentors.old_model import run_segmentor
from mmseg_sats.visualization.stage_model import StageModel

STRIDE = 8  # pixels of the image from one position that is used to the next
_NEVER = -1e4  # the logit of outputs beside the classes


@torch.no_grad()
def fit_oracle(stage: StageModel, dataset: IncrementalDataset, places: Iterable[int]) -> Tensor:
    """Fits a ridge regression to the input of the stage's classifier, and a constant 1, in one pass.

    Args:
        stage: its model, which does not change.
        dataset: images with the labels of all seen classes.
        places: the images to use; each is seen as a whole.

    Returns:
        The rows (K, C + 1), the last column the bias.

    Raises:
        NotMeasurableError: the model's logits are not those of a linear classifier ``conv_seg``.
    """
    head, channels = stage.model.decode_head, len(stage.classes)
    check_linear(head)
    moments = None
    for place in places:
        data = stage.preprocess(dataset[place])
        inputs, samples = data['inputs'], data['data_samples']
        features = _features(stage.model, inputs)
        labels = with_padding(samples[0].gt_sem_seg.data.long(), samples, inputs.shape[-2:]).to(inputs.device)
        labels = F.interpolate(labels[:, None].double(), features.shape[2:], mode='nearest')[:, 0].long()
        step = max(1, round(STRIDE * features.shape[2] / inputs.shape[-2]))
        features, labels = (maps[..., ::step, ::step] for maps in (features, labels))
        pixels = F.pad(features.movedim(1, -1).flatten(0, 2).double(), (0, 1), value=1.0)
        if moments is None:
            moments = pixels.new_zeros(channels, *2 * pixels.shape[1:])
        add_moments(moments, pixels, labels.flatten())
    return oracle_rows(moments)


def add_moments(moments: Tensor, pixels: Tensor, labels: Tensor) -> None:
    """Adds the second moments of pixels to those of their classes, in place.

    Args:
        moments: (K, D, D).
        pixels: (N, D).
        labels: (N,) integers; those from K on are left out.
    """
    for label in labels.unique().tolist():
        if label < len(moments):
            moments[label] += ridge_sums(pixels[labels == label], labels.new_zeros(int((labels == label).sum())), 1)[0]


def oracle_rows(moments: Tensor) -> Tensor:
    """The ridge regression (K, D) in which a pixel counts by 1 over the square root of its class's pixels.

    Where all count alike, it hardly ever predicts a small class; where all classes do, it hardly ever predicts
    background.

    Args:
        moments: (K, D, D), the sums of x x^T over each class's pixels, of which the last entry of every x is 1.
    """
    pixels = moments[:, -1, -1]
    weights = pixels.clamp(min=1).rsqrt()
    weights *= pixels.sum() / (weights * pixels).sum()
    return ridge_rows(torch.einsum('k,kde->de', weights, moments), weights[:, None] * moments[:, -1])


def _features(model: nn.Module, inputs: Tensor) -> Tensor:
    """The classifier's input (1, C, h, w) for an image."""
    scores: list[Tensor] = []
    handle = model.decode_head.conv_seg.register_forward_hook(lambda *call: scores.append(call[2]))
    try:
        output = run_segmentor(model, inputs, with_classifier=True)[0]
    finally:
        handle.remove()
    if len(scores) != 1 or not torch.equal(scores[0][:, : output.logits.shape[1]], output.logits):
        raise NotMeasurableError(f'the logits of {type(model.decode_head).__name__} are not those of its conv_seg')
    return output.classifier.features


@contextmanager
def oracle_in_place(head: nn.Module, rows: Tensor) -> Iterator[None]:
    """A context in which a head's classifier gives the oracle's scores, so that the model predicts with them.

    Args:
        head: the decode head.
        rows: of :func:`fit_oracle`.
    """

    def classify(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight, bias = rows[:, :-1, None, None], rows[:, -1]
        scores = F.conv2d(inputs[0].to(rows.dtype), weight, bias).to(output.dtype)
        beside = scores.new_full((len(scores), output.shape[1] - len(rows), *scores.shape[2:]), _NEVER)
        return torch.cat([scores, beside], 1)

    handle = head.conv_seg.register_forward_hook(classify)
    try:
        yield
    finally:
        handle.remove()
