# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Self-attention transfer as a part of a segmentor's loss; the loss itself is ``mmseg_sats.functional.crp_loss``."""

from collections.abc import Iterable, Sequence

from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.features.crp_loss import (
    NORMALISATIONS,
    check_masking,
    crp_loss,
    crp_loss_of_grids,
    without_new_classes,
)
from mmseg_sats.functional.features.region_distances import (
    DISTANCES,
    POOLINGS,
    Block,
    LabelGrids,
    grid_of,
)
from mmseg_sats.models.losses.blocks import block_indices, pick_blocks
from mmseg_sats.models.parts import DistillationPart
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.utils.spelling import choose

__all__ = ['CRPDistillationLoss', 'crp_loss']


def _attentions(output: SegmentorOutput) -> Sequence[Block]:
    if not output.attentions:
        raise ValueError(
            'the segmentor returned no attention: attention transfer needs a backbone with'
            ' forward_with_attention, such as AttentionMixVisionTransformer;'
            " with any other use source='feature'"
        )
    return output.attentions


def _features(output: SegmentorOutput) -> Sequence[Block]:
    return output.features


SOURCES = {
    'attention': (_attentions,),
    'feature': (_features,),
    'both': (_attentions, _features),
}


# All labels of 8-bit masks are below this number, so it is used as `num_labels` if there are fewer channels.
BYTE_LABELS = 256


@MODELS.register_module()
class CRPDistillationLoss(DistillationPart):
    """Self-attention transfer by class-region pooling, L_a of SATS; see ``crp_loss``.

    Args:
        pooling: ``'class'``, ``'global'`` or ``'none'``.
        source: what is compared: ``'attention'``, ``'feature'`` (the block's features) or ``'both'``,
            the sum of the two losses.
        blocks: indices of the backbone's attention maps or features. They are blocks, or layers if the
            backbone returns the maps of all layers (``attention_layers='all'``).
        distance: ``'l2'``, ``'squared_l2'`` or ``'cosine'``.
        normalisation: ``'per_block'`` or ``'paper'``.
        loss_weight: the factor of the loss, lambda_a.
        ignore_index: the label that belongs to no class.
        mask_new: whether the regions of new classes are left out, so that only the relations inside of old
            classes are transferred.

    Raises:
        ValueError: an argument's choice is unknown, ``blocks`` is empty or has negative or repeated
            indices, or ``mask_new`` is True and ``pooling`` is not ``'class'``.
    """

    def __init__(
        self,
        pooling: str = 'class',
        source: str = 'attention',
        blocks: Sequence[int] = (0, 1, 2, 3),
        distance: str = 'l2',
        normalisation: str = 'per_block',
        loss_weight: float = 1.0,
        ignore_index: int = 255,
        mask_new: bool = False,
    ) -> None:
        super().__init__()
        choose('pooling', pooling, POOLINGS)
        choose('distance', distance, DISTANCES)
        choose('normalisation', normalisation, NORMALISATIONS)
        if mask_new:
            check_masking(pooling)
        self._sources = choose('source', source, SOURCES)
        self.blocks = block_indices(blocks)
        self.pooling = pooling
        self.source = source
        self.distance = distance
        self.normalisation = normalisation
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.mask_new = mask_new
        self._prepared: tuple[Tensor, LabelGrids] | None = None

    @property
    def needs_attention(self) -> bool:
        """Whether the loss needs the backbone's attention maps."""
        return _attentions in self._sources

    def prepare(self, teacher: SegmentorOutput, labels: Tensor, num_channels: int) -> None:
        """Finds the class regions of labels (B, H, W) in advance, for the next call with the same labels.

        This must wait for the GPU, which has less queued work before the student's forward pass than
        after it.
        """
        grids = self._grids(teacher, 'teacher', labels, num_channels, teacher.logits.shape[1])
        if self.pooling == 'class':
            grids.by_class  # noqa: B018  a cached property, computed here
        self._prepared = labels, grids

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput, labels: Tensor) -> Tensor:
        """The weighted loss, a scalar; labels are (B, H, W).

        Raises:
            ValueError: the attention maps are missing, a block is out of range, or one of the errors of
                ``crp_loss``.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is labels:
            grids = prepared[1]
        else:
            grids = self._grids(student, 'student', labels, student.logits.shape[1], teacher.logits.shape[1])
        losses: Iterable[Tensor] = (
            crp_loss_of_grids(
                pick_blocks(blocks_of(student), self.blocks, 'student'),
                pick_blocks(blocks_of(teacher), self.blocks, 'teacher'),
                grids,
                self.pooling,
                self.distance,
                self.normalisation,
            )
            for blocks_of in self._sources
        )
        return self.loss_weight * sum(losses)

    def _grids(
        self, output: SegmentorOutput, owner: str, labels: Tensor, num_channels: int, num_old: int
    ) -> LabelGrids:
        blocks = [
            block
            for blocks_of in self._sources
            for block in pick_blocks(blocks_of(output), self.blocks, owner)
        ]
        num_labels = max(BYTE_LABELS, num_channels)
        if self.mask_new:
            labels = without_new_classes(labels, num_old, self.ignore_index)
        return LabelGrids(labels, self.ignore_index, num_labels, [grid_of(block) for block in blocks])
