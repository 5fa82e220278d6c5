# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Checks that the attention maps that a backbone returns are those that its layers compute.

This is for authors of ``forward_with_attention``: a map of the wrong queries trains without an error.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_sats.functional.attention.base import BaseAttentionMap
from mmseg_sats.functional.attention.window_attention_map import WindowAttentionMap
from mmseg_sats.models.backbones.check_maps import check_maps

# Relative to each entry of an attention map, and to the largest entry of a feature map.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
# Standard deviation of the noise on the weights. Without it, a missing bias that starts at 0 would not show.
NOISE = 0.02
# PyTorch 2.4 does not have the second one.
SOFTMAXES = [
    getattr(torch.ops.aten, name).default
    for name in ('_softmax', '_safe_softmax')
    if hasattr(torch.ops.aten, name)
]


@dataclass(frozen=True)
class BlockReport:
    """The result of comparing a block's map.

    Args:
        map: the map's shape and grid, as text.
        layer: number of the softmax of ``forward`` that the map equals, counted from 1.
        difference: the largest difference of an entry.
    """

    map: str
    layer: int
    difference: float


@dataclass(frozen=True)
class AttentionReport:
    """The result of ``check_attention``; ``str`` gives a line for each block.

    Args:
        backbone: the name of the backbone's class.
        images: the shape of the images.
        dtype: the precision in which it was run.
        features: how many feature maps there are.
        layers: how many softmaxes ``forward`` computed.
        blocks: one report for each map.
    """

    backbone: str
    images: tuple[int, ...]
    dtype: torch.dtype
    features: int
    layers: int
    blocks: tuple[BlockReport, ...]

    def __str__(self) -> str:
        lines = [
            f'{self.backbone} on images {self.images}, {self.dtype}: {self.features} features equal those of '
            f'forward; {len(self.blocks)} attention maps'
        ]
        lines += [
            f'block {index}: {block.map} equals softmax {block.layer} of {self.layers}, '
            f'largest difference {block.difference:.1e}'
            for index, block in enumerate(self.blocks)
        ]
        return '\n'.join(lines)


def check_attention(backbone: nn.Module, image: Tensor) -> AttentionReport:
    """Compares the maps that ``forward_with_attention`` returns with what ``forward`` computes.

    A copy of the backbone is run in eval mode and, where it can be, in double precision, its weights moved a
    little at random, so that biases which start at 0 count. The features must be those of ``forward``. Each map
    must be one that a layer computed, and the maps must stand in the order of the layers. Every ``softmax``
    over the last dimension is listened to, those of ``scaled_dot_product_attention`` and
    ``nn.MultiheadAttention`` among them.

    The check cannot see the order of tokens in a layer; in the map they must be row by row. To find a grid
    whose height and width are swapped, use an image that is not square.

    Args:
        backbone: has ``forward_with_attention(x) -> (features, attentions)``.
        image: (B, C, H, W), small, since complete maps are built. A single image is run together with its
            mirror image, so that confusing heads with images is found.

    Returns:
        A report of what was compared.

    Raises:
        ValueError: something differs (the message names the block), or nothing could be compared.
    """
    if not hasattr(backbone, 'forward_with_attention'):
        raise ValueError(f'{type(backbone).__name__} has no forward_with_attention')
    if image.dim() != 4 or not image.is_floating_point():
        raise ValueError(
            f'image must be floating point numbers (B, C, H, W), got {image.dtype} {tuple(image.shape)}'
        )
    images = image if len(image) > 1 else torch.cat([image, image.flip(3)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            outputs = _run(backbone, images, torch.float64)
        except (RuntimeError, TypeError):  # something in the backbone works only in float32
            outputs = _run(backbone, images, torch.float32)
        dtype, expected, computed, result = outputs
        features, maps = check_maps(result, images)
        _compare_features(features, expected, TOLERANCES[dtype])
        if not computed:
            raise ValueError(
                f'no map of {type(backbone).__name__} could be compared: its forward calls neither softmax over '
                'the last dimension nor scaled_dot_product_attention nor nn.MultiheadAttention where it can be '
                'heard (a compiled model, a kernel of its own?)'
            )
        blocks, used = [], set()
        for index, attention in enumerate(maps):
            block = _find(index, attention, computed, used, TOLERANCES[dtype])
            if blocks and block.layer < blocks[-1].layer:
                raise ValueError(
                    f'block {index}: its map is that of softmax {block.layer}, the map before it that of softmax '
                    f'{blocks[-1].layer}: expected the maps in the order in which the layers are run'
                )
            used.add(block.layer)
            blocks.append(block)
    return AttentionReport(
        type(backbone).__name__, tuple(images.shape), dtype, len(features), len(computed), tuple(blocks)
    )


def _run(
    backbone: nn.Module, images: Tensor, dtype: torch.dtype
) -> tuple[torch.dtype, Sequence[Any], list[Tensor], Any]:
    """The dtype, the features and softmaxes of ``forward``, and the result of ``forward_with_attention``."""
    own = copy.deepcopy(backbone).to(dtype)
    own.eval()  # not chained, because mmseg's ViT returns None from it
    generator = torch.Generator().manual_seed(0)
    for parameter in own.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(NOISE * noise.to(parameter))
    images = images.to(next((own.device for own in own.parameters()), images.device), dtype)
    with _heard_softmaxes() as computed:
        features = own(images)
    return dtype, features, computed, own.forward_with_attention(images)


class _Softmaxes(TorchDispatchMode):
    """Records the result of each softmax over the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAXES and result.dim() > 2 and args[1] in (-1, result.dim() - 1):
            self.results.append(result)
        return result


@contextmanager
def _heard_softmaxes() -> Iterator[list[Tensor]]:
    """A context that records all softmaxes; PyTorch's fused attention kernels, which hide them, are turned off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _Softmaxes() as record:
            yield record.results
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _flat(features: Any) -> Iterator[Tensor]:
    if isinstance(features, Tensor):
        yield features
    else:
        for feature in features:
            yield from _flat(feature)


def _compare_features(got: Any, expected: Any, tolerance: float) -> None:
    got, expected = list(_flat(got)), list(_flat(expected))
    if len(got) != len(expected):
        raise ValueError(
            f'forward_with_attention returns {len(got)} features, forward {len(expected)}'
        )
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one.shape != other.shape:
            raise ValueError(
                f'features {index}: expected {tuple(other.shape)} as from forward, got {tuple(one.shape)}'
            )
        difference, largest = (one - other).abs().max(), other.abs().max()
        if not difference <= tolerance * largest:
            raise ValueError(
                f'features {index}: forward_with_attention gives others than forward, by {difference:.1e} '
                f'at most, of numbers up to {largest:.1e}'
            )


def _find(
    index: int, attention: BaseAttentionMap, computed: Sequence[Tensor], used: set[int], tolerance: float
) -> BlockReport:
    """Finds the layer whose attention equals the map, among those that no other map has used."""
    nearest = float('inf')
    for layer, weights in enumerate(computed, 1):
        for own, theirs in _pairs(attention, weights) if layer not in used else ():
            difference = float((own - theirs).abs().max())
            if torch.allclose(own, theirs, rtol=tolerance, atol=tolerance**2):
                return BlockReport(attention.describe(), layer, difference)
            nearest = min(nearest, difference)
    if nearest == float('inf'):
        shapes = ', '.join(dict.fromkeys(str(tuple(weights.shape)) for weights in computed))
        raise ValueError(
            f'block {index}: no layer computed {attention.describe()}, or another block has it; the softmaxes '
            f'of forward gave {shapes}: expected the queries and keys of the softmax itself, in a '
            'WindowAttentionMap where it stays within windows'
        )
    raise ValueError(
        f'block {index}: no layer computed this {attention.describe()}, the nearest of its shape differs by '
        f'{nearest:.1e}: query and key swapped, another scale, a bias on the scores left out, or tokens or heads '
        'in another order?'
    )


def _pairs(attention: BaseAttentionMap, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the map and a layer's softmax in the map's shape; none if the softmax does not fit that shape."""
    if isinstance(attention, WindowAttentionMap):
        own = attention.in_windows()
        if weights.shape[-2:] == own.shape[-2:] and weights.numel() == own.numel():
            windows = attention.windows
            asks = windows.keys(own.device) >= windows.extra_keys
            yield tuple(value.transpose(2, 3)[:, asks] for value in (own, weights.reshape(own.shape)))
        return
    batch, heads, length, keys = attention.shape
    rows = weights.shape[-2]
    if weights.shape[-1] == keys and rows >= length and weights.numel() == batch * heads * rows * keys:
        own, theirs = attention.dense(), weights.reshape(batch, heads, rows, keys)
        yield own, theirs[:, :, rows - length :]
        if rows > length:  # the extra tokens may also come after those of the grid
            yield own, theirs[:, :, :length].roll(attention.extra_keys, 3)
