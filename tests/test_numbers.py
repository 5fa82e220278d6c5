# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Losses and gradients that are no numbers stop a run; odd but valid batches give numbers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.engine.files.snapshot import latest_checkpoint
from mmseg_sats.utils.checkpoint import load_checkpoint_safely
from tests.small_models import build, images, model_cfg, samples, save_weights

MakeConfig = Callable[..., Config]
OLD = 4


class _SpoiltGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


@MODELS.register_module()
class SpoiltLoss(nn.Module):
    """A distillation whose value or gradient is not finite at the calls ``at``."""

    def __init__(self, value: float | str = 0.0, gradient: float | str = 1.0, at: tuple = (2,)) -> None:
        super().__init__()
        # As text: a config file cannot hold numbers that are none.
        self.value, self.gradient, self.at, self.calls = float(value), float(gradient), at, 0

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        self.calls += 1
        loss = 1e-3 * student.logits.float().mean()
        if self.calls not in self.at:
            return loss
        return _SpoiltGradient.apply(loss, self.gradient) + self.value


@OPTIM_WRAPPERS.register_module()
class CpuAmp(AmpOptimWrapper):
    """mmengine's mixed precision, which it allows on a GPU alone, with a scaler for the CPU."""

    def __init__(self, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
            patch.setattr(f'{module}.is_cuda_available', lambda: True)
            patch.setattr(f'{module}.GradScaler', functools.partial(torch.amp.GradScaler, 'cpu'))
            super().__init__(dtype='bfloat16', **options)


@HOOKS.register_module()
class KeepFiles(Hook):
    """Notes the images of the batch under way."""

    files: list = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        self.files[:] = [sample.img_path for sample in data_batch['data_samples']]


def spoilt(shapes_cfg: MakeConfig, amp: bool = False, **options: Any) -> Config:
    cfg = shapes_cfg('finetune', protocol='3-3', checkpoint_iters=1)
    cfg.merge_from_dict(dict(distillation=dict(extra=dict(type='SpoiltLoss', **options))))
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='KeepFiles')]
    if amp:
        cfg.optim_wrapper.type = 'CpuAmp'
    return cfg


@pytest.mark.parametrize(
    ('options', 'what'),
    [
        (dict(value='nan'), r'loss is nan; loss_extra is nan'),
        (dict(value='inf'), r'loss is inf; loss_extra is inf'),
        (dict(gradient='nan'), r'the gradient of \S+, .* is not finite'),
    ],
)
def test_what_is_not_finite_stops_the_run(
    options: dict, what: str, shapes_cfg: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=rf'stage 1, iteration 2: .*{what}') as stopped:
        RUNNERS.build(spoilt(shapes_cfg, at=(2,), **options)).train()
    assert len(KeepFiles.files) == 8
    assert all(name in str(stopped.value) for name in KeepFiles.files)
    folder = tmp_path / 'run/stage_1'
    checkpoint = load_checkpoint_safely(latest_checkpoint(folder))
    assert checkpoint['meta']['iter'] == 1
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert not (folder / 'snapshot.pth').exists()


def test_a_skipped_step_is_counted(shapes_cfg: MakeConfig, tmp_path: Path) -> None:
    cfg = spoilt(shapes_cfg, amp=True, gradient='inf', at=(2, 4))
    cfg.default_hooks.logger.interval = 1
    cfg.epochs = 2
    RUNNERS.build(cfg).train()
    log = '\n'.join(path.read_text() for path in (tmp_path / 'run/stage_1').glob('*/*.log'))
    assert 'gradients overflowed at scale 65536, step skipped (1 so far); now 32768' in log
    assert 'step skipped (2 so far); now 16384' in log
    assert 'skipped_steps: 2' in log


def test_steps_skipped_for_ever_stop_the_run(shapes_cfg: MakeConfig) -> None:
    cfg = spoilt(shapes_cfg, amp=True, gradient='nan', at=tuple(range(100)))
    cfg.default_hooks.finite.max_skipped = 3
    with pytest.raises(FloatingPointError, match=r'stage 1, iteration 3: 3 steps in a row'):
        RUNNERS.build(cfg).train()


# odd batches, a whole step


def blank(value: int, batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.full((batch, height, width), value)


def one_pixel() -> Tensor:
    labels = blank(0)
    labels[0, 30, 30] = OLD
    return labels


def halves(first: int, second: int) -> Tensor:
    labels = blank(first)
    labels[:, 32:] = second
    return labels


# name: labels and number of new classes
EDGES = {
    'all background': (blank(0), 2),
    'all ignored': (blank(255), 2),
    'one image ignored': (torch.cat([blank(255, 1), blank(OLD, 1)]), 2),
    'no background': (halves(OLD, OLD + 1), 2),
    'one new class': (halves(0, OLD), 1),
    'one image': (halves(0, OLD)[:1], 2),
    'odd sizes': (blank(OLD, 2, 65, 97), 2),
    'one pixel high': (blank(OLD, 2, 33, 200), 2),
    'a class on one pixel': (one_pixel(), 1),
    '200 new classes': (halves(0, OLD + 150), 200),
    'a future label': (halves(OLD, 255), 1),
}
METHODS = {
    'sats': dict(
        pseudo_labeler=dict(type='EntropyPseudoLabeler', threshold=0.5),
        distillation=dict(
            attention=dict(type='CRPDistillationLoss', loss_weight=20.0),
            output=dict(type='UnbiasedDistillationLoss', loss_weight=20.0),
        ),
    ),
    'sats on features, to the letter': dict(
        distillation=dict(
            attention=dict(
                type='CRPDistillationLoss', source='both', distance='squared_l2', normalisation='paper'
            )
        )
    ),
    'mib': dict(distillation=dict(output=dict(type='UnbiasedDistillationLoss', loss_weight=10.0))),
}


# An old class that is never predicted matters to what is made of the old model's output, whatever the labels' size.
STEPS = [(edge, False, method) for edge in EDGES for method in METHODS] + [
    (edge, True, method) for edge in ('all background', 'no background') for method in METHODS
]


@pytest.mark.parametrize(('edge', 'never', 'method'), STEPS)
def test_a_whole_step_is_finite(edge: str, never: bool, method: str, tmp_path: Path) -> None:
    labels, new = EDGES[edge]
    old = build(model_cfg(OLD))
    with torch.no_grad():
        if never:
            old.decode_head.conv_seg.bias[2] = -1e4
    old_model = dict(checkpoint=save_weights(old, tmp_path / 'old.pth'), num_old=OLD)
    model = build(model_cfg(OLD + new, old_model=old_model, **METHODS[method]), seed=7).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = images(len(labels), *labels.shape[1:])
    losses = model.loss(inputs, samples(labels))
    total = sum(value for name, value in losses.items() if 'loss' in name)
    total.backward()
    optimizer.step()
    assert all(torch.isfinite(value).all() for value in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
