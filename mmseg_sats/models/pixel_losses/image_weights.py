# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Weights of pixels, or of whole images, in the losses of mmseg's heads.

A head gets a weight for every pixel from its pixel sampler and passes it to its ``loss_decode``. While the
losses of a batch are computed, the sampler is replaced by one that returns the weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import BasePixelSampler
from torch import Tensor


def weights_of_pixels(weights: Tensor, labels: Tensor) -> Tensor:
    """Weights (B, H, W) of the pixels of labels (B, H, W), from those or from weights (B,) of the images."""
    return weights if weights.dim() == 3 else weights[:, None, None].expand_as(labels)


def product(one: Tensor | None, other: Tensor | None, labels: Tensor) -> Tensor | None:
    """The product of weights (B,) of images or (B, H, W) of the pixels of labels (B, H, W); None stands for 1."""
    if one is None or other is None:
        return other if one is None else one
    if one.dim() != other.dim():
        one, other = (weights_of_pixels(weights, labels) for weights in (one, other))
    return one * other


class ImageWeightSampler(BasePixelSampler):
    """Gives every pixel its own weight or that of its image, times its weight from the head's own sampler.

    Args:
        weights: (B, H, W), the weights of the pixels, or (B,), those of the images.
        sampler: the head's own sampler, or None.
    """

    def __init__(self, weights: Tensor, sampler: BasePixelSampler | None = None) -> None:
        self.weights = weights
        self.sampler = sampler
        self.asked = False

    def sample(self, seg_logit: Tensor, seg_label: Tensor) -> Tensor:
        """The weights (B, H, W) for logits (B, K, H, W) and labels (B, 1, H, W)."""
        self.asked = True
        weights = weights_of_pixels(self.weights, seg_label[:, 0])
        if self.sampler is None:
            return weights
        return weights * self.sampler.sample(seg_logit, seg_label)


@contextmanager
def weighted_images(heads: Iterable[BaseDecodeHead], weights: Tensor | None) -> Iterator[None]:
    """A context in which the heads' losses weight pixels or images; the divisor is still the number of all pixels.

    Args:
        heads: decode and auxiliary heads.
        weights: (B, H, W) or (B,), or None to leave the losses unweighted.

    Raises:
        TypeError: a head has computed its loss without using the weights.
    """
    if weights is None:
        yield
        return
    heads = list(heads)
    own = [head.sampler for head in heads]
    samplers = [ImageWeightSampler(weights, sampler) for sampler in own]
    try:
        for head, sampler in zip(heads, samplers, strict=True):
            head.sampler = sampler
        yield
    finally:
        for head, sampler in zip(heads, own, strict=True):
            head.sampler = sampler
    for head, sampler in zip(heads, samplers, strict=True):
        if not sampler.asked:
            raise TypeError(
                f"{type(head).__name__} does not weigh pixels in its loss, so images cannot be weighed: expected a "
                "head with BaseDecodeHead's loss_by_feat, or a pseudo-labeler with scale_images=False and "
                'pixel_weights=None'
            )
