# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Weights of images in the losses of mmseg's heads.

A head asks its pixel sampler for a weight of every pixel and hands it to its ``loss_decode``. For the
length of a batch, a sampler that knows the images' weights takes that one's place.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import BasePixelSampler
from torch import Tensor


class ImageWeightSampler(BasePixelSampler):
    """Gives every pixel its image's weight, times what the head's own sampler gives it.

    Args:
        weights: (B,).
        sampler: the head's own, or None.
    """

    def __init__(self, weights: Tensor, sampler: BasePixelSampler | None = None) -> None:
        self.weights = weights
        self.sampler = sampler
        self.asked = False

    def sample(self, seg_logit: Tensor, seg_label: Tensor) -> Tensor:
        """The weights (B, H, W) for logits (B, K, H, W) and labels (B, 1, H, W)."""
        self.asked = True
        weights = self.weights[:, None, None].expand_as(seg_label[:, 0])
        if self.sampler is None:
            return weights
        return weights * self.sampler.sample(seg_logit, seg_label)


@contextmanager
def weighted_images(heads: Iterable[BaseDecodeHead], weights: Tensor | None) -> Iterator[None]:
    """Within it, the heads' losses weigh the images; the divisor stays the number of all pixels.

    Args:
        heads: decode and auxiliary heads.
        weights: (B,), or None to leave the losses as they are.

    Raises:
        TypeError: a head has computed its loss without asking for weights.
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
                "head with BaseDecodeHead's loss_by_feat, or a pseudo-labeler with scale_images=False"
            )
