# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""An optimizer's parameter groups, one for each set of options in place of one for each parameter."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

Group = dict[str, Any]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with parameters of the same options in one group.

    With ``paramwise_cfg`` mmengine makes every parameter a group of its own, and an optimizer then updates
    them one by one. Which options a parameter gets, and the update itself, are mmengine's and torch's.
    """

    def add_params(
        self, params: list[Group], module: nn.Module, prefix: str = '', is_dcn_module: Any = None
    ) -> None:
        """Adds the groups of a module and all below it to ``params``; calls itself for each child."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = merged(params)


def merged(groups: list[Group]) -> list[Group]:
    """Groups of equal options as one, in the order in which the options first come."""
    found: list[Group] = []
    for group in groups:
        options = _options(group)
        same = next((other for other in found if _options(other) == options), None)
        if same is None:
            found.append(dict(group, params=list(group['params'])))
        else:
            same['params'] += group['params']
    return found


def _options(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != 'params'}
