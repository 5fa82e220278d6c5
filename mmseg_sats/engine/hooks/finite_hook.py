# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Stops a run when a loss or gradient is infinite or NaN, before weights or checkpoints are damaged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmseg_sats.engine.files.snapshot import unwrap

_NAMED = 5


@HOOKS.register_module()
class FiniteHook(Hook):
    """Raises an error if a loss or gradient is infinite or NaN; it names stage, iteration, loss and images.

    Gradients are checked right before the optimizer's step, which is then skipped: the weights and the
    last checkpoint stay as they were before the iteration. With a loss scaler (mixed precision in
    float16), it is normal that the scaler skips some steps because scaled gradients overflow; these are
    counted in ``train/skipped_steps`` of the log.

    Args:
        max_skipped: this many skipped steps in a row are an error, because then no scale helps.
    """

    priority = 'HIGH'  # runs before EMA, schedulers and checkpoints use the iteration's result

    def __init__(self, max_skipped: int = 50) -> None:
        self.max_skipped = max_skipped
        self.skipped = self.in_a_row = 0
        self._spoiled: list[str] = []
        self._scale: float | None = None

    def before_train(self, runner: Runner) -> None:
        """Registers the check of gradients before each of the optimizer's steps."""
        self._scale = _scale(runner)
        model = unwrap(runner.model)
        runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda optimizer, *_: self._look_at(model, optimizer)
        )

    def _look_at(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group['params']]
        gradients = [gradient for gradient in gradients if gradient is not None]
        if not gradients or torch.isfinite(_total_norm(gradients)):
            return
        self._spoiled = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        if self._spoiled:
            optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Checks the losses and gradients of the iteration.

        Raises:
            FloatingPointError: a loss or gradient is not finite, or ``max_skipped`` steps in a row were
                skipped. The message names stage, iteration, losses, parameters and the batch's files.
        """
        losses = {
            name: float(value)
            for name, value in (outputs or {}).items()
            if 'loss' in name and not torch.isfinite(torch.as_tensor(value)).all()
        }
        if losses or self._spoiled:
            raise FloatingPointError(self._message(runner, losses, data_batch or {}))
        self._count_skipped(runner)

    def _count_skipped(self, runner: Runner) -> None:
        if self._scale is None:
            return
        # torch's scaler lowers its scale if and only if it has skipped a step.
        before, self._scale = self._scale, _scale(runner)
        if self._scale < before:
            self.skipped += 1
            self.in_a_row += 1
            print_log(
                f'iteration {runner.iter + 1}: gradients overflowed at scale {before:g}, step '
                f'skipped ({self.skipped} so far); now {self._scale:g}',
                logger='current',
            )
        elif runner.optim_wrapper.should_update():
            self.in_a_row = 0
        runner.message_hub.update_scalar('train/skipped_steps', self.skipped)
        if self.in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f'{_where(runner)}: {self.in_a_row} steps in a row had gradients that are not finite '
                f'at any scale, down to {self._scale:g}'
            )

    def _message(
        self, runner: Runner, losses: Mapping[str, float], batch: Mapping[str, Any]
    ) -> str:
        what = [f'{name} is {value}' for name, value in losses.items()]
        if self._spoiled:
            more = len(self._spoiled) - _NAMED
            names = ', '.join(self._spoiled[:_NAMED]) + (f' and {more} more' if more > 0 else '')
            what.append(f'the gradient of {names} is not finite')
        files = [sample.img_path for sample in batch.get('data_samples', ())]
        return (
            f'{_where(runner)}: {"; ".join(what)}. The batch was {", ".join(files)}. The last '
            'checkpoint was written before this iteration'
        )


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    if hasattr(nn.utils, 'get_total_norm'):  # since torch 2.6; on a GPU it takes fewer kernels than this loop
        return nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


def _where(runner: Runner) -> str:
    metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', {})
    return f'stage {metainfo.get("stage", 0)}, iteration {runner.iter + 1}'


def _scale(runner: Runner) -> float | None:
    wrapper = runner.optim_wrapper
    return wrapper.loss_scaler.get_scale() if isinstance(wrapper, AmpOptimWrapper) else None
