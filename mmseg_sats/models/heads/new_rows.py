# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""How the rows of new classes start: what a config's ``classifier_init`` says.

Some starts are made while a checkpoint is loaded (``CLASSIFIER_INITS``). Others need to know what the old model
sees in the pixels of the new classes, which a hook measures before the stage is trained.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmseg_sats.functional.new_rows import active_shares, attributions, largest_share, similar_rows
from mmseg_sats.models.heads.classifier import CLASSIFIER_INITS, Rows, balanced_bias
from mmseg_sats.models.heads.split_classifier import AUXILIARY
from mmseg_sats.utils.spelling import check_choice, near_match


@dataclass(frozen=True)
class MeasuredStart:
    """A start that depends on what the old model sees in the pixels of each new class.

    It makes the rows of the decode head's classifier. Auxiliary heads, which the old model does not have, start
    as with ``'keep_background'``.
    """

    grows_by: ClassVar[str] = 'keep_background'
    """The start of the decode head's rows until they are made."""

    epochs: ClassVar[int] = 0
    """For how many epochs what :meth:`make` returns is trained, while everything else is frozen."""

    hooks: ClassVar[Sequence[dict[str, Any]]] = (dict(type='NewRowsHook'),)
    """Configs of the hooks that the start needs; a run adds them to its own."""

    @abstractmethod
    def of_pixels(self, weight: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """What is measured in n pixels of a class, as a sum over them.

        Args:
            weight: (K_o, d) of the old model's classifier.
            features: (n, d), its inputs.
            logits: (n, K_o), its outputs.
        """

    @abstractmethod
    def make(self, rows: Rows, means: Tensor, shown: Tensor) -> Callable[[], Rows]:
        """Makes the rows of the classifier.

        Args:
            rows: ``weight`` (K, d) and ``bias`` (K,) of the classifier as it was grown, K_o old rows first.
            means: (N, ...) of the N new classes: the means over their pixels of what was measured, 0 where a class
                has none.
            shown: (N,) bool, whether a class has a pixel.

        Returns:
            A function that gives all rows; a module whose parameters are trained if ``epochs`` is not 0.
        """


@dataclass(frozen=True)
class SimilarStart(MeasuredStart):
    """New classes start as a mixture of the old classes that they look like to the old model (SELECT, 2026).

    Args:
        frequency: an old class counts as similar if the old model prefers it in more than this share of the new
            class's pixels.
        noise: standard deviation of what is drawn around the mixture, of which a tenth is taken.
    """

    frequency: float = 0.15
    noise: float = 0.05

    def __post_init__(self) -> None:
        _check_range('frequency', self.frequency, 0, 1)
        _check_range('noise', self.noise, 0, float('inf'))

    def of_pixels(self, weight: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """(K_o,), how many pixels the old model gives to each channel."""
        return torch.bincount(logits.argmax(1), minlength=len(weight)).double()

    def make(self, rows: Rows, means: Tensor, shown: Tensor) -> Callable[[], Rows]:
        """The mixtures."""
        weight, bias = (part.clone() for part in rows)
        num_old = means.shape[1]
        mixed, biases = similar_rows(weight[:num_old], bias[:num_old], means, self.frequency)
        drawn = mixed + self.noise * torch.randn(mixed.shape).to(mixed)
        weight[num_old:], bias[num_old:] = 0.9 * mixed + 0.1 * drawn, biases
        return lambda: (weight, bias)


@dataclass(frozen=True)
class AttributedStart(MeasuredStart):
    """The channels to which background owes its logit in a new class's pixels are added to a fresh row.

    Goswami et al., "Attribution-aware Weight Transfer", WACV 2023 (AWT).

    Args:
        share: which part of the channels is transferred.
        copy_bias: whether background and new classes also share background's bias as in the balanced start.
    """

    grows_by: ClassVar[str] = 'random'

    share: float = 0.25
    copy_bias: bool = False

    def __post_init__(self) -> None:
        _check_range('share', self.share, 0, 1)

    def of_pixels(self, weight: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """(d,), the attributions of background's logit to the channels."""
        return attributions(weight[0].double(), features.double().sum(0))

    def make(self, rows: Rows, means: Tensor, shown: Tensor) -> Callable[[], Rows]:
        """Fresh rows, to which parts of background's are added; a class without a pixel keeps its fresh row."""
        weight, bias = (part.clone() for part in rows)
        num_new = len(means)
        chosen = largest_share(means, self.share) & shown[:, None]
        weight[-num_new:] += weight[0] * chosen
        if self.copy_bias:
            bias[0] = bias[-num_new:] = balanced_bias(bias[0], num_new)
        return lambda: (weight, bias)


@dataclass(frozen=True)
class PretunedStart(MeasuredStart):
    """New rows are trained as transformations of all old ones before anything else is.

    Xie et al., "Early Preparation Pays Off: New Classifier Pre-tuning for Class Incremental Semantic Segmentation",
    ECCV 2024 (NeST).

    Args:
        epochs: for how long.
        lr: the learning rate of SGD, which falls to 0 with power 0.9.
        momentum: Nesterov's.
        weight_decay: of all that is trained.
    """

    epochs: int = 5
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f'classifier_init.epochs={self.epochs!r}: expected a whole number from 1 on')
        _check_range('lr', self.lr, 0, float('inf'))

    def of_pixels(self, weight: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """(K_o, d), see ``active_shares``."""
        return active_shares(weight, features, logits.softmax(1).double())

    def make(self, rows: Rows, means: Tensor, shown: Tensor) -> Callable[[], Rows]:
        """A :class:`RowMixture`."""
        return RowMixture(rows, means, shown)


class RowMixture(nn.Module):
    """New rows w_c = sum_k P_ck M_ck * w_k over the old rows w_k, with M_ck (d,), and background's row alike.

    P starts as the softmax over k of the sum of M_ck over the channels. A class without a pixel starts as
    background's row. Background itself is P_0 M_0 * w_0, with P_0 and M_0 starting at 1. New biases start as
    background's.

    Args:
        rows: ``weight`` (K, d) and ``bias`` (K,), of which the old ones are taken.
        means: (N, K_o, d), where M starts.
        shown: (N,) bool, whether a class has a pixel.
    """

    def __init__(self, rows: Rows, means: Tensor, shown: Tensor) -> None:
        super().__init__()
        num_new, num_old, channels = means.shape
        weight, bias = rows
        self.register_buffer('old_weight', weight[:num_old].detach().clone())
        self.register_buffer('old_bias', bias[:num_old].detach().clone())
        background = torch.zeros(num_old, channels, dtype=means.dtype)
        background[0] = 1
        means = torch.where(shown[:, None, None], means, background)
        self.importance = nn.Parameter(means.to(weight))
        self.projection = nn.Parameter(means.sum(2).softmax(1).to(weight))
        self.bias = nn.Parameter(bias[:1].expand(num_new).clone())
        self.background_importance = nn.Parameter(torch.ones_like(weight[0]))
        self.background_projection = nn.Parameter(torch.ones_like(bias[0]))

    def forward(self) -> Rows:
        """``weight`` (K, d) and ``bias`` (K,)."""
        old = self.old_weight
        background = self.background_projection * self.background_importance * old[0]
        new = torch.einsum('ck,ckd,kd->cd', self.projection, self.importance, old)
        return torch.cat([background[None], old[1:], new]), torch.cat([self.old_bias, self.bias])


MEASURED_STARTS: dict[str, type[MeasuredStart]] = {
    'attributed': AttributedStart,
    'pretuned': PretunedStart,
    'similar': SimilarStart,
}


class NewRows:
    """A config's ``classifier_init``.

    Args:
        cfg: the name of a start, or ``dict(type=name, align_norms=False, **options)`` with the options of a
            :class:`MeasuredStart`.

    Raises:
        ValueError: there is no such start or option, or an option is out of range.

    Attributes:
        measured: the start if it needs a pass over the stage's images, else None.
        align_norms: whether the new rows are scaled to the norms of the old ones.
    """

    def __init__(self, cfg: str | Mapping[str, Any]) -> None:
        options = dict(type=cfg) if isinstance(cfg, str) else dict(cfg)
        self.name = options.pop('type', None)
        check_choice('classifier_init', self.name, (*CLASSIFIER_INITS, *MEASURED_STARTS))
        self.align_norms = bool(options.pop('align_norms', False))
        kind = MEASURED_STARTS.get(self.name)
        known = [field.name for field in fields(kind)] if kind else []
        for name in options:
            if name not in known:
                known = ['align_norms', *known]
                raise ValueError(
                    f'classifier_init.{name} is no option of {self.name!r}{near_match(name, known)}; expected one of '
                    f'{known}'
                )
        self.measured = kind(**options) if kind else None

    def grows_by(self, decode_head: bool) -> str:
        """The start of a head's rows while a checkpoint is loaded.

        Args:
            decode_head: whether it is the decode head, which alone has what ``measured`` makes, and an auxiliary row.
        """
        if self.measured is not None:
            return self.measured.grows_by if decode_head else MeasuredStart.grows_by
        return 'random' if self.name == AUXILIARY and not decode_head else self.name


def hooks_of_start(cfg: Any) -> Sequence[dict[str, Any]]:
    """The configs of the hooks that a ``classifier_init`` needs."""
    kind = MEASURED_STARTS.get(cfg.get('type') if isinstance(cfg, Mapping) else cfg)
    return kind.hooks if kind else ()


def measured_classifier(head: nn.Module, tensors: Mapping[str, int]) -> str:
    """The name in the decode head of the classifier whose inputs are measured.

    Args:
        head: the decode head.
        tensors: its tensors with a row for each class, see ``class_tensors``.

    Raises:
        TypeError: the head's logits are not those of a 1x1 convolution ``conv_seg``.
    """
    found = [key.removesuffix('.weight') for key in tensors if key.split('.')[-2:] == ['conv_seg', 'weight']]
    # Of a CascadeHead, the last one gives the prediction.
    if not found or head.state_dict()[f'{found[-1]}.weight'].shape[2:] != (1, 1):
        raise TypeError(
            f'classifier_init: decode_head ({type(head).__name__}) has no classifier of pixels conv_seg, whose '
            f'inputs could be measured: expected one of {list(CLASSIFIER_INITS)}'
        )
    return found[-1]


def _check_range(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f'classifier_init.{name}={value!r}: expected a number from {least} to {most}')
