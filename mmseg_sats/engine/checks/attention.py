# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A backbone's attention is asked for once before stage 0 is trained, not first in stage 1."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import Tensor, nn

from mmseg_sats.models.attention.base import BaseAttentionMap
from mmseg_sats.models.backbones.check_maps import check_maps
from mmseg_sats.models.losses import CRPDistillationLoss
from mmseg_sats.models.parts import DistillationPart, flag

SMALL = 128  # pixels a side


def check_handed_out(cfg: Config, model: nn.Module) -> None:
    """Asks the backbone for the attention of one random image, where a part of ``distillation`` will.

    Shapes, grids and a few rows are looked at; :func:`mmseg_sats.models.check_attention` looks at more.

    Args:
        cfg: a stage's config.
        model: the stage's, just built, without an old model.

    Raises:
        ValueError: the backbone cannot give it, or gives something else; ``model.backbone`` and, where one
            is at fault, the block are named. ``blocks`` of a part that there are not.
    """
    parts = getattr(model, 'distillation', {}).items()
    wanting = {name: part for name, part in parts if flag(part, 'needs_attention', DistillationPart)}
    if not wanting:
        return
    with torch.random.fork_rng(devices=[]):
        maps = _first_that_works(model.backbone, _images(cfg, model.backbone))
    for name, part in wanting.items():
        if isinstance(part, CRPDistillationLoss) and max(part.blocks) >= len(maps):
            raise ValueError(
                f'distillation.{name}.blocks={list(part.blocks)}: the backbone hands out {len(maps)} attention '
                f'maps, expected indices from 0 to {len(maps) - 1}'
            )


def _first_that_works(backbone: nn.Module, images: Iterator[Tensor]) -> Sequence[BaseAttentionMap]:
    """The maps of the first image for which nothing is wrong; raises what is wrong with the last."""
    for image in images:
        try:
            return _maps(backbone, image)
        except ValueError as error:
            last = error
    raise last


def _images(cfg: Config, backbone: nn.Module) -> Iterator[Tensor]:
    """Random images (1, C, H, W): a small one, which is soon done, and one of the size that the run trains with."""
    size = cfg.get('crop_size') or getattr(backbone, 'img_size', None) or 512
    whole = (size, size) if isinstance(size, int) else tuple(size)
    mean = (cfg.model.get('data_preprocessor') or {}).get('mean') or ()
    channels = len(mean) if len(mean) > 1 else cfg.model.backbone.get('in_channels', 3)
    generator = torch.Generator().manual_seed(0)
    # Not every backbone takes a small one.
    for height, width in dict.fromkeys([tuple(min(side, SMALL) for side in whole), whole]):
        yield torch.randn(1, channels, height, width, generator=generator)
    # What is made empty and filled by init_weights may have been anything so far.
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
    """What ``forward_with_attention`` returns in eval mode, on a CPU or else on the device of the run."""
    training, errors = backbone.training, []
    backbone.eval()
    try:
        for device in dict.fromkeys(['cpu', get_device()]):
            try:
                with torch.no_grad():
                    return backbone.to(device).forward_with_attention(image.to(device))
            except Exception as error:  # whatever it is, the run would meet it
                errors.append(error)
    finally:
        backbone.to('cpu').train(training)
    error = errors[-1]
    raise ValueError(
        f'model.backbone: {type(backbone).__name__}.forward_with_attention fails on an image of '
        f'{tuple(image.shape)}: {type(error).__name__}: {error}'
    ) from error
