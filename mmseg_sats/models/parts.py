# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The base classes of a method's parts: how the segmentor calls them, and what they can request by flags.

A flag is a class attribute, or a property if it depends on an argument. All defaults are set here. A part
that does not inherit from one of the two base classes is treated as if it had the default flags.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.utils.spelling import near_match, one_slip


class DistillationPart(nn.Module):
    """A loss beside the segmentation loss, one entry of the segmentor's ``distillation``."""

    needs_attention: ClassVar[bool] = False
    """Whether the part needs the attention maps of student and old model, ``attentions``."""

    needs_teacher: ClassVar[bool] = True
    """Whether the part needs an old model. If False, it is used in stage 0 too, where ``teacher`` is None."""

    needs_all_teachers: ClassVar[bool] = False
    """Whether the part needs ``teacher.earlier``, the outputs of the models of the stages before the previous one. They
    are kept in memory and run in every iteration."""

    needs_prototypes: ClassVar[bool] = False
    """Whether the part needs ``student.prototypes``, which the segmentor computes if its ``prototypes`` is set."""

    needs_classifier: ClassVar[bool] = False
    """Whether the part needs ``classifier`` of student and old model: the features before it, and its rows."""

    needs_auxiliary: ClassVar[bool] = False
    """Whether the part trains ``student.classifier.auxiliary``, which ``classifier_init='auxiliary'`` adds."""

    needs_residuals: ClassVar[bool] = False
    """Whether the part needs ``student.classifier.residual``, which ``background_residuals`` of the model adds."""

    reduces_over_ranks: ClassVar[bool] = False
    """Whether the loss already is that of the whole batch in a distributed run. If False, it is taken to be
    a mean over the pixels or images of one process, and is averaged over the processes."""

    hooks: ClassVar[Sequence[dict[str, Any]]] = ()
    """Configs of the hooks that the part needs; a run adds them to its own."""

    def prepare(self, teacher: SegmentorOutput | None, labels: Tensor, num_channels: int) -> None:
        """Called before the student's forward pass; for computations whose results must be read from the GPU.

        Such a read waits for all work queued on the GPU, which is least at this moment.

        Args:
            teacher: the old model's output, None if there is no old model.
            labels: (B, H, W) long, completed by the pseudo-labelers.
            num_channels: the student's channels, background included.
        """

    def image_weights(
        self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor
    ) -> Tensor | None:
        """Returns factors (B,) of the images in the segmentation loss, or None to leave it unweighted.

        Called after the student's forward pass, with the arguments of :meth:`forward`. It must return factors, or None,
        on all processes of a distributed run.
        """

    @abstractmethod
    def forward(
        self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor
    ) -> Tensor:
        """Returns the weighted loss, a scalar; labels (B, H, W) are the tensor that ``prepare`` got."""


class WeightedPart(DistillationPart):
    """The base class of the parts that multiply their loss by ``loss_weight``.

    Args:
        loss_weight: factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f'loss_weight={self.loss_weight}'


class PseudoLabeler:
    """Completes the labels of a stage's images, or of images from outside.

    It is a plain object, not a module, so nothing of it enters a model's ``state_dict``.
    """

    needs_student: ClassVar[bool] = False
    """Whether the labeler is also called with the student's logits, as the third argument."""

    needs_pass: ClassVar[bool] = False
    """Whether the labeler needs a pass of the old model over the stage's images before training. It must then
    have ``reset(num_old)``, ``update(labels, teacher_logits)`` for every batch, ``histograms`` (which are
    summed over the processes) and ``compute()``; ``state_dict()`` and ``load_state_dict(state)`` save and
    restore the result."""

    pixelwise: ClassVar[bool] = False
    """Whether each pixel is labelled independently, so that the labeler may be called with some of the pixels."""

    hooks: ClassVar[Sequence[dict[str, Any]]] = (dict(type='PseudoLabelThresholdHook'),)
    """Configs of the hooks that the labeler needs; a run adds them to its own. The default hook loads the
    old model before training, and makes the pass for a labeler with ``needs_pass``."""

    @abstractmethod
    def __call__(self, labels: Tensor, teacher_logits: Tensor, *student_logits: Tensor) -> Tensor:
        """Returns the completed labels, a new tensor like ``labels``.

        Args:
            labels: (B, H, W) integers, 0 for background; not modified.
            teacher_logits: (B, K_o, H, W), the old model's logits at the labels' size.
            *student_logits: (B, K, H, W), the student's logits, for a labeler with ``needs_student``.
        """

    def image_weights(self, labels: Tensor, completed: Tensor) -> Tensor | None:
        """Returns the images' weights (B,) in the segmentation loss, or None to leave the loss unweighted.

        Args:
            labels: (B, H, W), the argument of ``__call__``.
            completed: (B, H, W), its result.
        """


def with_wrapped(part: Any) -> Iterator[Mapping[str, Any]]:
    """A part's config and those of the part that it wraps, its key ``part``, the outermost first; nothing for None."""
    while isinstance(part, Mapping) and 'type' in part:
        yield part
        part = part.get('part')


def flag(part: object, name: str, base: type) -> Any:
    """The flag of a part, or the default of the base class if the part does not have it."""
    return getattr(part, name, getattr(base, name))


def check_flags(where: str, part: object, base: type) -> None:
    """Checks that the names of a part's flags ``needs_...`` are not misspelt.

    Args:
        where: the config's key, for the message.
        part: an object of any class.
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
