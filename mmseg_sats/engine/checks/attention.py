# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks a backbone's attention before stage 0 is trained, although it is first needed in stage 1."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import Tensor, nn

from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.models.backbones.check_maps import check_maps
from mmseg_sats.models.losses import CRPDistillationLoss
from mmseg_sats.models.parts import DistillationPart, flag
from mmseg_sats.models.segmentors.adaptive_weight import without_weight

SMALL = 128  # pixels on a side


def check_backbone_attention(cfg: Config, model: nn.Module) -> None:
    """Runs the backbone on a random image and checks its attention maps, if a part of ``distillation`` needs them.

    Only shapes, grids and a few rows are checked; :func:`mmseg_sats.models.check_attention` checks more.

    Args:
        cfg: a stage's config.
        model: the stage's newly built model, without an old model.

    Raises:
        ValueError: the backbone cannot compute attention maps or its maps are wrong (the message names
            ``model.backbone`` and the wrong block), or a part's ``blocks`` do not exist.
    """
    parts = getattr(model, 'distillation', {}).items()
    wanting = {name: part for name, part in parts if flag(part, 'needs_attention', DistillationPart)}
    if not wanting:
        return
    with torch.random.fork_rng(devices=[]):
        maps = _first_that_works(model.backbone, _images(cfg, model.backbone))
    for name, part in wanting.items():
        if isinstance(without_weight(part), CRPDistillationLoss) and max(part.blocks) >= len(maps):
            raise ValueError(
                f'distillation.{name}.blocks={list(part.blocks)}: the backbone hands out {len(maps)} attention '
                f'maps, expected indices from 0 to {len(maps) - 1}'
            )


def _first_that_works(backbone: nn.Module, images: Iterator[Tensor]) -> Sequence[BaseAttentionMap]:
    """The maps of the first image that passes the checks; raises the error of the last image if none does."""
    for image in images:
        try:
            return _maps(backbone, image)
        except ValueError as error:
            last = error
    raise last


def _images(cfg: Config, backbone: nn.Module) -> Iterator[Tensor]:
    """Random images (1, C, H, W): first a small one, which is fast, then one of the training crop's size."""
    size = cfg.get('crop_size') or getattr(backbone, 'img_size', None) or 512
    whole = (size, size) if isinstance(size, int) else tuple(size)
    mean = (cfg.model.get('data_preprocessor') or {}).get('mean') or ()
    channels = len(mean) if len(mean) > 1 else cfg.model.backbone.get('in_channels', 3)
    generator = torch.Generator().manual_seed(0)
    # The larger one is for backbones that do not accept small images.
    for height, width in dict.fromkeys([tuple(min(side, SMALL) for side in whole), whole]):
        yield torch.randn(1, channels, height, width, generator=generator)
    # Parameters that only init_weights fills may have held arbitrary values so far, so it is tried once more.
    if hasattr(backbone, 'init_weights'):
        backbone.init_weights()
        yield torch.randn(1, channels, *whole, generator=generator)


def _maps(backbone: nn.Module, image: Tensor) -> Sequence[BaseAttentionMap]:
    result = _ask(backbone, image)
    try:
        return check_maps(result, image)[1]
    except ValueError as error:
        raise ValueError(
            f'model.backbone: {type(backbone).__name__}.forward_with_attention on an image of '
            f'{tuple(image.shape)}: {error}'
        ) from error


def _ask(backbone: nn.Module, image: Tensor) -> Any:
    """Calls ``forward_with_attention`` in eval mode on the CPU and, if that fails, on the device of the run."""
    training, errors = backbone.training, []
    backbone.eval()
    try:
        for device in dict.fromkeys(['cpu', get_device()]):
            try:
                with torch.no_grad():
                    return backbone.to(device).forward_with_attention(image.to(device))
            except Exception as error:  # any error here would also stop the run
                errors.append(error)
    finally:
        backbone.to('cpu').train(training)
    error = errors[-1]
    raise ValueError(
        f'model.backbone: {type(backbone).__name__}.forward_with_attention fails on an image of '
        f'{tuple(image.shape)}: {type(error).__name__}: {error}'
    ) from error
