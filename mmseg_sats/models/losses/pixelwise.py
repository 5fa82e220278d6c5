# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses over pixels as parts of a segmentor's loss; ``mmseg_sats.functional`` has the functions of the same names."""

from typing import Any

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.pixels.knowledge_distillation import knowledge_distillation_of_pixels
from mmseg_sats.functional.pixels.label_guided import label_guided_distillation_of_pixels
from mmseg_sats.functional.pixels.per_pixel import PixelChunk
from mmseg_sats.functional.pixels.self_entropy import self_entropy_of_pixels
from mmseg_sats.functional.pixels.sigmoid import (
    check_trained,
    number_of_labelled,
    sigmoid_cross_entropy_of_pixels,
    sigmoid_distillation_of_pixels,
)
from mmseg_sats.functional.pixels.unbiased import (
    check_num_old,
    unbiased_cross_entropy_of_pixels,
    unbiased_distillation_of_pixels,
)
from mmseg_sats.models.pixel_losses.base import PixelwiseDistillationLoss, PixelwiseSegmentationLoss


@MODELS.register_module()
class KnowledgeDistillationLoss(PixelwiseDistillationLoss):
    """:func:`knowledge_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 100 published for LwF and ILT, 10 for ILT in the SATS
            comparison.
    """

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""
        return knowledge_distillation_of_pixels(chunk)


@MODELS.register_module()
class LabelGuidedDistillationLoss(PixelwiseDistillationLoss):
    """:func:`label_guided_distillation` between student and old model, at the labels' size.

    Which pixels are annotated as a new class is read from the completed labels: the package's labelers change
    background pixels alone, and give them old classes or ignore them, so every label of a new class is an
    annotation. (``FusedPseudoLabeler`` also gives new classes, which then count as annotated.) An exemplar has the
    true labels of all seen classes, so its pixels of new classes count too. A pixel that a labeler ignored is
    distilled as any other that is not of a new class, and so is one that the annotators ignored: MiB's distillation
    here is over all pixels too.

    Args:
        loss_weight: factor of the loss: 25 published for MBS. LGKD's weights are for a sum over channels:
            ``loss_weight='$num_old'`` in a config.
        old_weight: factor of the pixels that are not annotated as a new class, LGKD's lambda_b.
        new_weight: factor of the pixels that are annotated as a new class, LGKD's lambda_n.

    Raises:
        ValueError: ``old_weight`` or ``new_weight`` is negative.
    """

    def __init__(self, loss_weight: float = 1.0, old_weight: float = 1.0, new_weight: float = 1.0) -> None:
        super().__init__(loss_weight)
        for name, weight in (('old_weight', old_weight), ('new_weight', new_weight)):
            if not weight >= 0:
                raise ValueError(f'LabelGuidedDistillationLoss.{name} must be at least 0, got {weight}')
        self.old_weight = old_weight
        self.new_weight = new_weight

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""
        return label_guided_distillation_of_pixels(chunk, self.old_weight, self.new_weight)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'{super().extra_repr()}, old_weight={self.old_weight}, new_weight={self.new_weight}'


@MODELS.register_module()
class SelfEntropyLoss(PixelwiseDistillationLoss):
    """``-loss_weight * self_entropy``: minimising it makes the new model's predictions less confident.

    The old model's output is not used.

    Args:
        loss_weight: factor of the loss.
    """

    def __init__(self, loss_weight: float = 0.1) -> None:
        super().__init__(loss_weight)

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """Minus the entropy of each pixel of a chunk, (n, w)."""
        return -self_entropy_of_pixels(chunk)


@MODELS.register_module()
class SigmoidCrossEntropyLoss(PixelwiseSegmentationLoss):
    """:func:`sigmoid_cross_entropy` as the ``loss_decode`` of an mmseg head.

    The sigmoid keeps the order of the logits, so mmseg's prediction, their argmax, is right for it.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
        num_old: K_o, the old model's channels: those of the old classes are not trained with the labels. 1 trains all.
        background: whether channel 0 is trained. False needs a model with ``background_logit``.
        pos_weight: factor of the loss of a label's own channel: 1 published for DKD (2 in stage 0), 4 for STAR.

    Raises:
        ValueError: ``num_old`` is less than 1, or ``pos_weight`` is not positive.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ce',
        num_old: int = 1,
        background: bool = True,
        pos_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, loss_name)
        if num_old < 1:
            raise ValueError(f'num_old counts the background and must be at least 1, got {num_old}')
        if not pos_weight > 0:
            raise ValueError(f'{type(self).__name__}.pos_weight must be positive, got {pos_weight}')
        self.num_old = num_old
        self.background = background
        self.pos_weight = pos_weight

    @property
    def leaves_out_background(self) -> bool:
        """Whether channel 0 is not trained, so that it must be constant."""
        return not self.background

    def check(self, channels: int) -> None:
        """Raises ValueError if none of the channels is trained."""
        check_trained(self.num_old, self.background, channels)

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w), 0 for ignored pixels."""
        return sigmoid_cross_entropy_of_pixels(chunk, self.num_old, self.background, self.pos_weight)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        own = f'num_old={self.num_old}, background={self.background}, pos_weight={self.pos_weight}'
        return f'{super().extra_repr()}, {own}'


@MODELS.register_module()
class OneVsRestLoss(SigmoidCrossEntropyLoss):
    """:func:`one_vs_rest` as the ``loss_decode`` of an mmseg head.

    Args:
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.
        **options: ``num_old``, ``background`` and ``pos_weight`` of :class:`SigmoidCrossEntropyLoss`.
    """

    avg_non_ignore = True  # mmseg's name for a mean over the pixels that are not ignored

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_bce', **options: Any) -> None:
        super().__init__(loss_weight, loss_name, **options)

    def divisor(self, label: Tensor, ignore_index: int) -> Tensor:
        """The number of pixels that are not ignored, at least 1."""
        return number_of_labelled(label, ignore_index)


@MODELS.register_module()
class SigmoidDistillationLoss(PixelwiseDistillationLoss):
    """:func:`sigmoid_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 10 published for LwF-MC, 5 for DKD.
        background: whether channel 0 is distilled; False where it is constant (``background_logit``).
    """

    def __init__(self, loss_weight: float = 1.0, background: bool = True) -> None:
        super().__init__(loss_weight)
        self.background = background

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""
        return sigmoid_distillation_of_pixels(chunk, self.background)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'{super().extra_repr()}, background={self.background}'


@MODELS.register_module()
class UnbiasedCrossEntropyLoss(PixelwiseSegmentationLoss):
    """:func:`unbiased_cross_entropy` as the ``loss_decode`` of an mmseg head.

    Only label 0 may be any old class. If a pixel is labelled as an old class (in the ``sequential``
    setting, in exemplars, by pseudo-labels), its loss is plain cross-entropy. MiB's released code first
    turns such labels into background, so that they mean no more than "some old class". Without such
    labels, in the other settings, both are the same.

    Args:
        num_old: K_o, the old model's channels, background included.
        loss_weight: factor of the loss.
        loss_name: its key in the head's losses; must contain ``loss`` to be summed.

    Raises:
        ValueError: ``num_old`` is less than 1.
    """

    def __init__(self, num_old: int, loss_weight: float = 1.0, loss_name: str = 'loss_ce') -> None:
        super().__init__(loss_weight, loss_name)
        if num_old < 1:
            raise ValueError(f'num_old counts the background and must be at least 1, got {num_old}')
        self.num_old = num_old

    def check(self, channels: int) -> None:
        """Raises ValueError if there are fewer channels than those of the old model."""
        check_num_old(self.num_old, channels)

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w), 0 for ignored pixels."""
        return unbiased_cross_entropy_of_pixels(chunk, self.num_old)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'num_old={self.num_old}, {super().extra_repr()}'


@MODELS.register_module()
class UnbiasedDistillationLoss(PixelwiseDistillationLoss):
    """:func:`unbiased_distillation` between student and old model, at the labels' size.

    Args:
        loss_weight: factor of the loss: 10 published, 100 for VOC 15-1, 40 in the SATS comparison,
            20 as SATS's lambda_d.
    """

    def per_pixel(self, chunk: PixelChunk) -> Tensor:
        """The loss of each pixel of a chunk, (n, w)."""
        return unbiased_distillation_of_pixels(chunk)
