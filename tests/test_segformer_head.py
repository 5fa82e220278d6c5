# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""``LeanSegformerHead`` computes what mmseg's head computes."""

from typing import Any

import pytest
import torch
from mmseg.models import SegformerHead
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_sats.models import LeanSegformerHead

CHANNELS = (8, 16, 24, 32)


def make_pair(**options: Any) -> tuple[SegformerHead, LeanSegformerHead]:
    """mmseg's head and ours with the same random weights, in float64."""
    cfg: dict[str, Any] = dict(
        in_channels=list(CHANNELS), in_index=[0, 1, 2, 3], channels=12, num_classes=5, dropout_ratio=0.0,
        norm_cfg=dict(type='BN'), align_corners=False,
    ) | options  # fmt: skip
    torch.manual_seed(0)
    heads = SegformerHead(**cfg).double(), LeanSegformerHead(**cfg).double()
    for parameter in heads[0].parameters():
        nn.init.normal_(parameter, std=0.5)
    heads[1].load_state_dict(heads[0].state_dict(), strict=True)
    return heads


def make_levels() -> list[Tensor]:
    """Feature maps of two images, the sizes of which are no multiples of one another."""
    torch.manual_seed(1)
    sizes = ((13, 10), (7, 5), (4, 3), (2, 2))
    return [
        torch.randn(2, channels, *size, dtype=torch.float64).requires_grad_()
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def results(head: SegformerHead, levels: list[Tensor]) -> list[Tensor]:
    """Logits, the gradients of all inputs and parameters, and the running statistics."""
    torch.manual_seed(2)
    logits = head(levels)
    torch.manual_seed(3)
    parameters = [*levels, *head.parameters()]
    grads = torch.autograd.grad(logits, parameters, torch.randn_like(logits), allow_unused=True)
    return [logits, *(grad for grad in grads if grad is not None), *(buffer.double() for buffer in head.buffers())]


@pytest.mark.parametrize('training', [True, False], ids=['training', 'eval'])
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(align_corners=True),
        dict(interpolate_mode='nearest', align_corners=None),
        dict(norm_cfg=None),
        dict(act_cfg=dict(type='GELU')),
        dict(dropout_ratio=0.5),
        dict(in_index=[3], in_channels=[32]),
        dict(in_index=[1, 3], in_channels=[16, 32]),
    ],
    ids=lambda options: ','.join(options) or 'as configured',
)
def test_outputs_gradients_and_statistics_are_those_of_mmseg(options: dict[str, Any], training: bool) -> None:
    levels = make_levels()
    stock, lean = (results(head.train(training), levels) for head in make_pair(**options))
    assert len(stock) == len(lean) > 5
    for theirs, ours in zip(stock, lean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_maps_of_all_levels_together_are_never_made() -> None:
    head, levels = make_pair()[1], make_levels()
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[2:] == levels[0].shape[2:]:
                made.append(out.shape[1])
            return out

    with torch.no_grad(), Sizes():
        head(levels)
    assert max(made) == head.channels < head.channels * len(head.convs)


def test_under_autocast_it_is_off_by_less_than_three_times_what_mmsegs_is() -> None:
    levels = [level.detach().float() for level in make_levels()]
    stock, lean = (head.float().eval() for head in make_pair())
    exact = stock(levels)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        errors = [float((head(levels).float() - exact).abs().max()) for head in (stock, lean)]
    assert 0 < errors[1] < 3 * errors[0]
