# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The losses of a head's own outputs."""

from mmseg.models.decode_heads import DDRHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.utils import SampleList, add_prefix
from torch import Tensor, nn


def head_losses(
    head: BaseDecodeHead, output: Tensor | tuple[Tensor, ...], samples: SampleList
) -> dict[str, Tensor]:
    """The losses of a head by its own names.

    mmseg's ``DDRHead`` expects a list of two losses, for its context and its spatial output, and does not tell
    them which label is ignored. With a single loss, which is what a method gives, both outputs are trained as
    those of any other head.

    Args:
        head: a decode head.
        output: what it returned in training: logits (B, K, h, w), or a tuple that begins with them.
        samples: the labels.
    """
    if isinstance(head, DDRHead) and not isinstance(head.loss_decode, nn.ModuleList):
        losses: dict[str, Tensor] = {}
        for name, logits in zip(('context', 'spatial'), output, strict=True):
            losses |= add_prefix(BaseDecodeHead.loss_by_feat(head, logits, samples), name)
        return losses
    return head.loss_by_feat(output, samples)
