# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The parts of a method: what they are called with, and what they may ask of the segmentor.

Each flag is a class attribute, or a property where it depends on an argument, with its default here and
nowhere else. A part that inherits from one of the two base classes gets all of them; one that does not
is read as if it had the defaults.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.utils.spelling import near_match, one_slip


class DistillationPart(nn.Module):
    """A loss beside the segmentation loss, one entry of the segmentor's ``distillation``."""

    needs_attention: ClassVar[bool] = False
    """Whether the backbones of student and old model hand out their attention maps, ``attentions``."""

    needs_teacher: ClassVar[bool] = True
    """Whether there must be an old model. A part without this takes part in stage 0, with teacher None."""

    needs_prototypes: ClassVar[bool] = False
    """Whether ``student.prototypes`` must be there, which the segmentor's option of that name gathers."""

    reduces_over_ranks: ClassVar[bool] = False
    """Whether the loss is that of the whole batch on several processes already. One without this is
    taken for a mean over pixels or images, and averaged."""

    hooks: ClassVar[Sequence[dict[str, Any]]] = ()
    """Configs of the hooks that the part needs; a run adds them to its own."""

    def prepare(self, teacher: SegmentorOutput | None, labels: Tensor, num_channels: int) -> None:
        """Called before the student's forward pass, for what a GPU would have to be waited for later.

        Args:
            teacher: the old model's output, None where there is no old model.
            labels: (B, H, W) long, completed by the pseudo-labelers.
            num_channels: the student's channels, background included.
        """

    @abstractmethod
    def forward(
        self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor
    ) -> Tensor:
        """The weighted loss, a scalar; labels (B, H, W) are those that ``prepare`` got."""


class PseudoLabeler:
    """What completes the labels of a stage's images, or of images from outside.

    A plain object: nothing of it enters a model's ``state_dict``.
    """

    needs_student: ClassVar[bool] = False
    """Whether it is called with the student's logits too, as the third argument."""

    needs_pass: ClassVar[bool] = False
    """Whether the old model must see the stage's images once before training: ``reset(num_old)``,
    ``update(labels, teacher_logits)`` for every batch, ``histograms`` (summed over the processes),
    ``compute()``; ``state_dict()`` and ``load_state_dict(state)`` keep what was found."""

    pixelwise: ClassVar[bool] = False
    """Whether each pixel is labelled by itself, so that it may be called with any part of them."""

    hooks: ClassVar[Sequence[dict[str, Any]]] = (dict(type='PseudoLabelThresholdHook'),)
    """Configs of the hooks that the labeler needs; a run adds them to its own. This one reads the old
    model before training, and makes the pass of a labeler with ``needs_pass``."""

    @abstractmethod
    def __call__(self, labels: Tensor, teacher_logits: Tensor, *student_logits: Tensor) -> Tensor:
        """The completed labels, a new tensor like ``labels``.

        Args:
            labels: (B, H, W) integers, 0 for background; left as they are.
            teacher_logits: (B, K_o, H, W), the old model's at the labels' size.
            *student_logits: (B, K, H, W), the student's, for a labeler with ``needs_student``.
        """

    def image_weights(self, labels: Tensor, completed: Tensor) -> Tensor | None:
        """Factors (B,) of the images in the segmentation loss, or None for none.

        Args:
            labels: (B, H, W), as ``__call__`` got them.
            completed: what it returned.
        """


def flag(part: object, name: str, base: type) -> Any:
    """A flag of a part, or its default in the base class where the part does not inherit from that."""
    return getattr(part, name, getattr(base, name))


def check_flags(where: str, part: object, base: type) -> None:
    """Refuses a part that asks for something by a name that nothing reads.

    Args:
        where: the config's key, for the message.
        part: of any class.
        base: ``DistillationPart`` or ``PseudoLabeler``, whose flags it may have.

    Raises:
        ValueError: a ``needs_...`` that the base class does not have, or nearly the name of a flag, with a
            near match.
    """
    known = [name for name in vars(base) if not name.startswith('_') and name != 'forward']
    for name in sorted(set(dir(part)) - set(dir(nn.Module)) - set(known)):
        if name.startswith('needs_') or any(one_slip(name, other) for other in known):
            raise ValueError(
                f'{where}: {type(part).__name__}.{name} is read by nothing{near_match(name, known)}; '
                f'expected one of {known}'
            )
