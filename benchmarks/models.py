# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A SegFormer with random weights, its old model and a batch: what the benchmarks of steps train."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import mmseg_sats  # noqa: F401  registers the parts
from benchmarks.measure import device
from mmseg_sats.models.segmentors.old_model import OldModel

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
SIZES = {
    'B0': dict(embed_dims=32, num_layers=[2, 2, 2, 2]),
    'B2': dict(embed_dims=64, num_layers=[3, 4, 6, 3]),
    'B5': dict(embed_dims=64, num_layers=[3, 6, 40, 3]),
}
METHOD_WORDS = ('segmentation_loss', 'pseudo_labeler', 'distillation', 'classifier_init')


@dataclass
class Stage:
    """A method's model in a later stage, its optimizer and a batch.

    Args:
        model: the student with its old model.
        optimizer: SGD as in the recipes.
        inputs: (B, 3, H, W), as the data preprocessor leaves them.
        samples: their labels.
        dtype: what autocast works in; None without it. float16 has its losses scaled.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    samples: list[SegDataSample]
    dtype: torch.dtype | None = None

    def autocast(self) -> AbstractContextManager:
        """The precision of the step."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.inputs.device.type, dtype=self.dtype)

    def loss(self) -> Tensor:
        """The sum of the step's losses."""
        with self.autocast():
            losses = self.model.loss(self.inputs, self.samples)
        return sum(value for name, value in losses.items() if 'loss' in name)

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self._scaler.scale(self.loss()).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()

    @cached_property
    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.inputs.device.type, enabled=self.dtype == torch.float16)

    @property
    def labels(self) -> Tensor:
        """(B, H, W)."""
        return torch.cat([sample.gt_sem_seg.data for sample in self.samples])

    def old_forward(self) -> None:
        """The old model's forward pass over the batch."""
        with self.autocast():
            self.model.old_model(self.inputs)


def stage(
    method: str,
    num_old: int,
    num_new: int,
    *,
    dtype: torch.dtype | None = None,
    crop_size: int = 512,
    batch_size: int = 2,
    size: str = 'B2',
    **changes: Any,
) -> Stage:
    """A SegFormer in a stage of a method of ``configs/``, with random weights.

    Args:
        method: a folder of ``configs/``.
        num_old: channels of the old model, background included.
        num_new: classes of the stage.
        dtype: what autocast works in; None without it.
        crop_size: of the images.
        batch_size: how many images.
        size: of the encoder, a name of ``SIZES``.
        **changes: values of the method's file, changed.
    """
    init_default_scope('mmseg')
    torch.manual_seed(0)
    values = _method_values(method) | changes
    with device():
        model = MODELS.build(_method_model(size, num_old + num_new, values)).train()
        model._old_model = OldModel(MODELS.build(_method_model(size, num_old, _method_values('finetune'))))
    model._old_model_cfg = dict(num_old=num_old)
    inputs = torch.randn(batch_size, 3, crop_size, crop_size, device=device())
    labels = label_maps(batch_size, crop_size, range(num_old, num_old + num_new))
    made = Stage(model, make_optimizer(model), inputs, samples_of(labels), dtype)
    if model.pseudo_labeler is not None:
        _label_as_trained(made)
    return made


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD as in the recipes, which all sides of a ratio are trained with."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)


def samples_of(labels: Tensor) -> list[SegDataSample]:
    """Data samples of labels (B, H, W)."""
    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


def _label_as_trained(made: Stage) -> None:
    """Lets the old model's pseudo-labels be what trained ones are, in number if not in place.

    Random weights see everything everywhere. With another bias of background four pixels in five are
    background; with thresholds in the middle half of the pixels are sure.
    """
    old, labeler = made.model.old_model, made.model.pseudo_labeler
    logits = old(made.inputs).logits
    wanted = (logits[:, 1:].amax(1) - logits[:, 0]).flatten().quantile(0.8)
    old.model.decode_head.conv_seg.bias[0] += wanted
    logits[:, 0] += wanted
    labeler.reset(logits.shape[1])
    labeler.update(torch.zeros_like(logits[:, 0], dtype=torch.long), logits)
    labeler.compute()


def label_maps(batch_size: int, size: int, classes: range) -> Tensor:
    """Labels (B, size, size): a third of the pixels a square of up to four classes, the rest background."""
    labels = torch.zeros(batch_size, size, size, dtype=torch.long, device=device())
    side = round(size * (1 / 3) ** 0.5)
    for index, label in enumerate(labels):
        top = (size - side) * (index + 1) // (batch_size + 1)
        pieces = label[top : top + side, top : top + side].chunk(min(len(classes), 4), dim=1)
        for number, piece in enumerate(pieces):
            piece.fill_(classes[(index + number) % len(classes)])
    return labels


def _method_values(method: str) -> dict[str, Any]:
    """The values of a method's own file that the model asks for."""
    cfg = Config.fromfile(CONFIGS / method / f'{method}.py')
    return {name: cfg.get(name) for name in METHOD_WORDS}


def _method_model(size: str, num_classes: int, values: dict[str, Any]) -> Config:
    cfg = model_config(size, num_classes)
    cfg.decode_head.loss_decode = values['segmentation_loss']
    for name in METHOD_WORDS[1:]:
        cfg[name] = values[name]
    return cfg


def model_config(size: str, num_classes: int) -> Config:
    """The model's config without what a method and a run put in: loss parts, pretrained weights, data, SyncBN."""
    cfg = Config.fromfile(CONFIGS / '_base_/models/segformer.py').model
    cfg.pop('data_preprocessor')
    cfg.backbone.pop('init_cfg')
    cfg.backbone.update(SIZES[size])
    cfg.decode_head.in_channels = [heads * SIZES[size]['embed_dims'] for heads in cfg.backbone.num_heads]
    norm_cfg = dict(type='BN', requires_grad=True)
    cfg.decode_head.update(num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=dict(type='CrossEntropyLoss'))
    return cfg
