# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The rules by which an ``AdaptiveWeight`` measures the factor of a part's loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mmseg_sats.functional.over_ranks import sum_over_ranks
from mmseg_sats.functional.precision import full_precision, working_dtype
from mmseg_sats.utils.spelling import near_match

# Gradients of means over many pixels are below what float16 can hold, as in a GradScaler; large ones would be above it.
# A power of two changes no other precision.
_SCALES = (2.0**16, 1.0)
_RECOMPUTED = (
    "with rule='gradient_norm' needs gradients of a single layer, which are not available where activations are "
    "recomputed; expected no activation checkpointing (with_cp=False in model.backbone), or rule='old_regions'"
)
_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass
class Batch:
    """What a rule can look at in an iteration.

    Args:
        segmentation: the sum of the heads' losses; of the whole batch on several processes.
        backbone: the student's encoder.
        labels: (B, H, W), completed.
        num_old: K_o, channels of the old model; 1 without one.
        num_channels: K, channels of the student.
    """

    segmentation: Tensor
    backbone: nn.Module
    labels: Tensor
    num_old: int
    num_channels: int
    _norms: dict[str, Tensor] = field(default_factory=dict, init=False)

    def segmentation_norm(self, layer: str) -> Tensor:
        """The norm of the segmentation loss's gradient, which is measured once for all parts."""
        if layer not in self._norms:
            self._norms[layer] = gradient_norm(self.segmentation, self.backbone, layer, 'the segmentation loss')
        return self._norms[layer]


class Rule(Protocol):
    """Measures a factor."""

    relative: ClassVar[bool]
    """Whether the factor is one of ``initial``."""

    def check(self, where: str, backbone: nn.Module) -> None:
        """Called with the model's encoder before the rule is used; ``where`` is the part's key.

        Raises:
            ValueError: nothing can be measured in it.
        """

    def __call__(self, loss: Tensor, batch: Batch) -> Tensor:
        """The factor, a scalar; not finite, or 0, if there is nothing to measure."""


@dataclass
class _Options:
    @classmethod
    def of_options(cls, rule: str, given: Mapping[str, Any]) -> Any:
        """The rule with its options; TypeError for those of another rule."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise TypeError(
                    f'AdaptiveWeight.{name} does nothing with rule={rule!r}, whose options are '
                    f'{sorted(cls.__dataclass_fields__)}'
                )
        return cls(**given)


@dataclass
class GradientNorm(_Options):
    """``ratio`` times the norm of the segmentation loss's gradient over that of the part's, in one layer."""

    ratio: float = 1.0
    layer: str | None = None
    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio < float('inf'):
            raise ValueError(f'AdaptiveWeight.ratio={self.ratio!r}: expected a number above 0')

    def check(self, where: str, backbone: nn.Module) -> None:
        """Finds the layer. Raises ValueError if it is not there, is frozen, or cannot be differentiated by itself."""
        kind = type(backbone).__name__
        layer = self.layer = self.layer or last_block(backbone)
        if layer is None:
            raise ValueError(f"{where}: {kind} has no list of blocks; expected layer='NAME', one of its modules")
        modules = dict(backbone.named_modules())
        if layer not in modules:
            raise ValueError(f'{where}.layer={layer!r} is no module of {kind}{near_match(layer, modules)}')
        if not any(True for _ in trained(modules[layer])):
            raise ValueError(
                f"{where}: rule='gradient_norm' measures gradients of backbone.{layer}, which has no weight that is "
                "trained; expected an encoder that is not frozen, or rule='old_regions'"
            )
        if any(getattr(module, 'with_cp', False) for module in modules.values()):
            raise ValueError(f'{where} {_RECOMPUTED}')

    def __call__(self, loss: Tensor, batch: Batch) -> Tensor:
        """The factor; infinite if the part's gradient is 0."""
        own = gradient_norm(loss, batch.backbone, self.layer, 'the loss of the part')
        return self.ratio * batch.segmentation_norm(self.layer) / own


@dataclass
class OldRegions(_Options):
    """``expected`` over the share of the old classes in the regions of a batch."""

    expected: float | None = None
    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.expected is not None and not 0 < self.expected <= 1:
            raise ValueError(f'AdaptiveWeight.expected={self.expected!r}: expected a share in (0, 1]')

    def check(self, where: str, backbone: nn.Module) -> None:
        """Any encoder will do."""

    def __call__(self, loss: Tensor, batch: Batch) -> Tensor:
        """The factor; infinite if there is no region of an old class."""
        flat = batch.labels.flatten(1)
        known = flat.masked_fill((flat < 0) | (flat >= batch.num_channels), 0)
        present = known.new_zeros(len(known), batch.num_channels).scatter_(1, known, 1)[:, 1:].sum(0)
        old, regions = sum_over_ranks(torch.stack([present[: batch.num_old - 1].sum(), present.sum()]))
        expected = self.expected or (batch.num_old - 1) / max(batch.num_channels - 1, 1)
        return expected * regions / old


RULES: dict[str, type[GradientNorm | OldRegions]] = {'gradient_norm': GradientNorm, 'old_regions': OldRegions}


def gradient_norm(loss: Tensor, backbone: nn.Module, layer: str, what: str) -> Tensor:
    """The norm of a loss's gradient with respect to the trained weights of a layer, a scalar, in float32 at least.

    The graph is kept. Only what lies between the loss and the layer is run backward. On several processes it is the
    norm of the mean of their gradients, which is the gradient of a loss of the whole batch.

    Args:
        loss: a scalar.
        backbone: the encoder.
        layer: name of a module of it.
        what: the loss, for the message.

    Raises:
        ValueError: the loss does not depend on the layer, or activations are recomputed.
    """
    weights = list(trained(backbone.get_submodule(layer)))
    norm = loss.new_tensor(float('inf'))
    for scale in _SCALES:
        if not norm.isfinite():  # it is the same on all processes
            norm = _scaled_norm(loss, weights, scale, f'{what} does not depend on backbone.{layer}')
    return norm


def _scaled_norm(loss: Tensor, weights: Sequence[Tensor], factor: float, without: str) -> Tensor:
    """The norm, by the gradients of the loss times ``factor``; ``without`` says that there are none."""
    found: tuple[Tensor | None, ...] = (None,) * len(weights)
    if loss.requires_grad:
        scale = torch.full_like(loss, factor)
        try:
            with full_precision(loss):
                found = torch.autograd.grad(loss, weights, scale, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if 'checkpoint' not in str(error):
                raise
            raise ValueError(f'AdaptiveWeight {_RECOMPUTED}') from error
        if all(gradient is None for gradient in found):
            raise ValueError(
                f'{without}, whose gradients AdaptiveWeight compares; expected losses '
                "that reach the encoder's last block, layer='NAME' of another module of the encoder, and no activation "
                'checkpointing, which hides the weights'
            )
    pairs = zip(weights, found, strict=True)
    flat = torch.cat([(torch.zeros_like(weight) if own is None else own).flatten() for weight, own in pairs])
    with torch.no_grad():
        flat = flat.to(working_dtype(flat)) / factor
        # The last element counts the processes.
        total = sum_over_ranks(torch.cat([flat, flat.new_ones(1)]))
        return torch.linalg.vector_norm(total[:-1] / total[-1])


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that are not frozen."""
    return (weight for weight in module.parameters() if weight.requires_grad)


def last_block(backbone: nn.Module) -> str | None:
    """The name of an encoder's last block; None if it has no list of blocks.

    A block is the last element of a list of modules that is itself of several parts, and holds no other block. Lists
    need not be registered in the order in which they are run, and Twins has one of patch embeddings too. Encoders have
    most channels at their end, so of all such blocks it is the largest, and of equal ones the last.
    """
    blocks = {
        f'{name}.{len(module) - 1}'.removeprefix('.'): module[-1]
        for name, module in backbone.named_modules()
        if isinstance(module, _LISTS) and len(module) and _is_block(module[-1])
    }
    sizes = {
        name: sum(weight.numel() for weight in blocks[name].parameters())
        for name in reversed(blocks)
        if not any(other.startswith(f'{name}.') for other in blocks)
    }
    return max(sizes, key=sizes.__getitem__, default=None)


def _is_block(module: nn.Module) -> bool:
    parts = [child for child in module.children() if any(True for _ in child.parameters())]
    return len(parts) > 1 and not isinstance(module, _LISTS)
