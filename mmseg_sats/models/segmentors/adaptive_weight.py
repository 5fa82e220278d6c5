# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A weight of a distillation that is found in training, as a wrapper around any part.

Which weight is right depends on the stage: Qiu et al., *SATS* (Pattern Recognition 2023), section 4.5, note that
without pseudo-labels or memory fewer regions of old classes are left, so that L_a is small and lambda_a must grow. By
how much is left open there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.models.parts import DistillationPart, check_flags
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors.weight_rules import RULES, Batch, Rule
from mmseg_sats.utils.spelling import choose


@MODELS.register_module()
class AdaptiveWeight(nn.Module):
    """A part whose loss is multiplied by a factor lambda, which is measured in training.

    In every ``every``-th iteration the rule measures what lambda would be right for the batch. This is limited to
    ``bounds`` and taken into a moving average, lambda, which is constant in between. The first measurement sets the
    average. If the part's loss is 0, or there is nothing to measure (no region of an old class, a gradient of 0),
    nothing changes. A stage begins anew from ``initial``.

    All flags and methods are those of the wrapped part. :func:`adapt_weights` applies the factor; ``forward`` returns
    the wrapped part's own loss. ``AdaptiveWeightHook`` saves the average for resuming; it is no part of ``state_dict``.

    Args:
        part: config of the wrapped part. Its ``loss_weight`` makes no difference with ``'gradient_norm'``, which
            measures it along with the loss.
        rule: ``'gradient_norm'``: lambda is ``ratio`` times the norm of the segmentation loss's gradient with respect
            to the weights of the encoder's last layer, over that of the part's gradient. ``'old_regions'``: lambda is
            ``initial`` times ``expected`` over the share that the old classes have in the regions of the batch, which
            are pairs of an image and a foreground class of its completed labels.
        ratio: of the two norms, above 0, for ``'gradient_norm'``; 1 by default.
        layer: name of the measured module within the backbone, e.g. ``'layers.3.1.1'``, for ``'gradient_norm'``; by
            default the last of the backbone's blocks.
        expected: the share at which lambda is ``initial``, in (0, 1], for ``'old_regions'``; by default the share of
            the old classes in all seen classes.
        every: number of iterations from one measurement to the next.
        momentum: share of the previous average in the new one, in [0, 1).
        bounds: the smallest and the largest lambda.
        initial: lambda before the first measurement.

    Raises:
        TypeError: ``part`` has no ``type``, or an option belongs to the other rule.
        ValueError: an option is out of range, ``part`` is itself an ``AdaptiveWeight``, or has an unknown flag.
    """

    hooks: ClassVar[Sequence[dict[str, Any]]] = (dict(type='AdaptiveWeightHook'),)

    def __init__(
        self,
        part: dict[str, Any],
        rule: str = 'gradient_norm',
        ratio: float | None = None,
        layer: str | None = None,
        expected: float | None = None,
        every: int = 20,
        momentum: float = 0.9,
        bounds: Sequence[float] = (0.01, 1000.0),
        initial: float = 20.0,
    ) -> None:
        super().__init__()
        _check_options(part, every, momentum, bounds, initial)
        given = {
            name: value
            for name, value in dict(ratio=ratio, layer=layer, expected=expected).items()
            if value is not None
        }
        self.rule: Rule = choose('AdaptiveWeight.rule', rule, RULES).of_options(rule, given)
        self.part = MODELS.build(part)
        if isinstance(self.part, AdaptiveWeight):
            raise ValueError('AdaptiveWeight.part is an AdaptiveWeight too; expected the part itself')
        check_flags('AdaptiveWeight.part', self.part, DistillationPart)
        self.every = every
        self.momentum = momentum
        self.bounds = tuple(bounds)
        self.initial = initial
        self.iterations = 0
        self._tried = False
        self.register_buffer('weight', torch.tensor(float(initial)), persistent=False)
        self.register_buffer('measured', torch.tensor(False), persistent=False)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is the wrapped part's: its flags, ``prepare``, ``image_weights``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'part' or name.startswith('_'):
                raise
            return getattr(self.part, name)

    def forward(self, student: SegmentorOutput, teacher: SegmentorOutput | None, labels: Tensor) -> Tensor:
        """The wrapped part's loss, without lambda."""
        return self.part(student, teacher, labels)

    def adapt(self, loss: Tensor, batch: Batch) -> Tensor:
        """Lambda for this iteration, a scalar, measured before if it is time for it.

        Args:
            loss: the part's, without lambda, on several processes that of the whole batch.
            batch: what rules can look at.

        Raises:
            ValueError: the segmentation loss or the part's does not depend on the measured layer.
        """
        if self.training and torch.is_grad_enabled():
            self.iterations += 1
            due = self.iterations % self.every == 0
            # Measured in the first iteration too, so that an error is not raised late; its result is not used, since
            # student and old model hardly differ.
            if due or not self._tried:
                self._tried = True
                measured = self.rule(loss, batch)
                if due:
                    self.update(loss, measured * self.initial if self.rule.relative else measured)
        return self.weight.clone()  # the loss's graph keeps it, while the buffer changes in place

    @torch.no_grad()
    def update(self, loss: Tensor, measured: Tensor) -> None:
        """Takes a measured lambda into the average, unless ``loss`` is 0 or the measurement is no number above 0."""
        found = measured.to(self.weight).clamp(*self.bounds)
        average = self.weight.lerp(found, 1 - self.momentum).where(self.measured, found)
        # Decided on the device: reading the values would wait for it.
        valid = (loss != 0) & measured.isfinite() & (measured > 0)
        self.weight.copy_(average.where(valid, self.weight))
        self.measured |= valid

    def running_state(self) -> dict[str, Any]:
        """The average and its counts, for resuming."""
        return dict(
            iterations=self.iterations, weight=self.weight.cpu().clone(), measured=self.measured.cpu().clone()
        )

    def load_running_state(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`running_state` returned."""
        self.iterations = state['iterations']
        self.weight.copy_(state['weight'])
        self.measured.copy_(state['measured'])

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f'{self.rule}, every={self.every}, momentum={self.momentum}, bounds={self.bounds}, initial={self.initial}'
        )


def without_weight(part: nn.Module) -> nn.Module:
    """The part that is wrapped, or the part itself if it is not."""
    return part.part if isinstance(part, AdaptiveWeight) else part


def check_weights(model: EncoderDecoder) -> None:
    """Checks that the weights of a segmentor's ``distillation`` can be measured in it.

    Raises:
        ValueError: the measured layer does not exist, is frozen, or recomputes its activations (``with_cp=True``), or a
            wrapped part's name contains ``loss``.
    """
    for name, part in model.distillation.items():
        if isinstance(part, AdaptiveWeight):
            if 'loss' in name:
                raise ValueError(
                    f'distillation.{name}: its weight is logged as weight_{name}, which mmengine would add to the '
                    'loss; expected a name without "loss"'
                )
            part.rule.check(f'distillation.{name}', model.backbone)


def adapt_weights(
    model: EncoderDecoder,
    losses: Mapping[str, Any],
    parts: Mapping[str, nn.Module],
    labels: Tensor,
    teacher: SegmentorOutput | None,
) -> dict[str, Any]:
    """Multiplies the losses of adaptive parts by their weights, and adds these as ``weight_NAME``.

    Args:
        model: the segmentor.
        losses: of the whole batch on several processes; ``loss_NAME`` for a part, other names for the heads.
        parts: the parts that are used, by name.
        labels: (B, H, W), completed.
        teacher: the old model's output, or None.
    """
    adaptive = {name: part for name, part in parts.items() if isinstance(part, AdaptiveWeight)}
    if not adaptive:
        return dict(losses)
    keys = {f'loss_{name}' for name in parts}
    own, _ = model.parse_losses({name: value for name, value in losses.items() if name not in keys})
    num_old = 1 if teacher is None else teacher.logits.shape[1]
    batch = Batch(own, model.backbone, labels, num_old, model.num_classes)
    weights = {name: part.adapt(losses[f'loss_{name}'], batch) for name, part in adaptive.items()}
    weighted = {f'loss_{name}': weight * losses[f'loss_{name}'] for name, weight in weights.items()}
    return {**losses, **weighted, **{f'weight_{name}': weight for name, weight in weights.items()}}


def _check_options(
    part: Any, every: Any, momentum: float, bounds: Sequence[float], initial: float
) -> None:
    if not (isinstance(part, Mapping) and part.get('type')):
        raise TypeError(f'AdaptiveWeight.part={part!r}: expected the config of a part, with its type')
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f'AdaptiveWeight.every={every!r}: expected a number of iterations, 1 or more')
    if not 0 <= momentum < 1:
        raise ValueError(f'AdaptiveWeight.momentum={momentum!r}: expected a number in [0, 1)')
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < float('inf'):
        raise ValueError(f'AdaptiveWeight.bounds={tuple(bounds)}: expected two numbers above 0, the smaller one first')
    if not bounds[0] <= initial <= bounds[1]:
        raise ValueError(f'AdaptiveWeight.initial={initial!r}: expected a number within bounds={tuple(bounds)}')
