"""Parameter groups: one for each set of options, the same options and the same steps as mmengine's."""

import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmseg_sats.engine  # noqa: F401  registers the constructor
from mmseg_sats.engine.training.optim_groups import merged

CFG = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0), norm=dict(decay_mult=0.0))),
)


class Model(nn.Module):
    """A backbone with a norm, and a head whose bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.head.bias.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.backbone:
            x = layer(x)
        return self.head(self.norm(x))


def trained(constructor: str) -> tuple[Model, torch.optim.Optimizer]:
    """A model after five steps."""
    torch.manual_seed(0)
    model = Model()
    optimizer = build_optim_wrapper(model, dict(CFG, constructor=constructor)).optimizer
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_the_steps_are_those_of_a_group_for_each_parameter() -> None:
    (one, single), (other, grouped) = (
        trained(name) for name in ('DefaultOptimWrapperConstructor', 'GroupedOptimWrapperConstructor')
    )
    assert len(single.param_groups) == 7
    assert [len(group['params']) for group in grouped.param_groups] == [4, 2, 1]
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.head.weight, Model().head.weight)


def test_every_parameter_keeps_its_options() -> None:
    (_, single), (_, grouped) = (
        trained(name) for name in ('DefaultOptimWrapperConstructor', 'GroupedOptimWrapperConstructor')
    )
    options = [
        sorted(
            (tuple(p.shape), group['lr'], group['weight_decay'])
            for group in optimizer.param_groups
            for p in group['params']
        )
        for optimizer in (single, grouped)
    ]
    assert options[0] == options[1]


def test_groups_come_in_the_order_of_their_first_parameter_and_share_no_list() -> None:
    given = [dict(params=[1], lr=1), dict(params=[2]), dict(params=[3], lr=1), dict(params=[4], lr=2)]
    assert merged(given) == [dict(params=[1, 3], lr=1), dict(params=[2]), dict(params=[4], lr=2)]
    assert given[0] == dict(params=[1], lr=1)
