# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The Swin Transformer (arXiv:2103.14030), which also returns the attention maps of its windows."""

from typing import Any

import torch.nn.functional as F
from mmseg.models.backbones import SwinTransformer
from mmseg.models.backbones.swin import ShiftWindowMSA, SwinBlock, WindowMSA
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_sats.functional.attention.window_attention_map import WindowAttentionMap
from mmseg_sats.functional.attention.windows import Windows
from mmseg_sats.models.backbones.self_attention import ATTENTION_LAYERS, GridSize, run_layer
from mmseg_sats.utils.spelling import check_choice


@MODELS.register_module()
class AttentionSwinTransformer(SwinTransformer):
    """mmseg's ``SwinTransformer`` with the same parameters and features, plus its attention maps.

    A layer attends within windows, with a learned bias for the relative position, and every second layer
    shifts the grid before it is cut into windows. A row of a map is 0 outside the window of its position.
    mmseg pads the grid to whole windows. The padding also gets attention: it is among the keys
    (``extra_keys``), so that the rows sum to 1.

    Args:
        *args: positional arguments of mmseg's ``SwinTransformer``.
        attention_layers: the layers whose attention ``forward_with_attention`` returns: the ``'last'``
            of each block, or ``'all'``.
        **kwargs: keyword arguments of mmseg's ``SwinTransformer``.

    Raises:
        ValueError: if ``attention_layers`` is neither of the two.
    """

    def __init__(self, *args: Any, attention_layers: str = 'last', **kwargs: Any) -> None:
        check_choice('attention_layers', attention_layers, ATTENTION_LAYERS)
        super().__init__(*args, **kwargs)
        self.attention_layers = attention_layers

    def forward_with_attention(
        self, x: Tensor
    ) -> tuple[list[Tensor], tuple[WindowAttentionMap, ...]]:
        """Features, and the attention maps before dropout.

        Args:
            x: (B, in_channels, H, W) images.

        Returns:
            The result of ``forward``, and the attention maps from the first block to the last: one per
            block, of its last layer, or one per layer. All blocks are included, whatever
            ``out_indices`` is.
        """
        features: list[Tensor] = []
        attentions: list[WindowAttentionMap] = []
        x, hw = self.patch_embed(x)
        if self.use_abs_pos_embed:
            x = x + self.absolute_pos_embed
        x = self.drop_after_pos(x)
        for index, stage in enumerate(self.stages):
            chosen = range(len(stage.blocks))[ATTENTION_LAYERS[self.attention_layers]]
            for number, block in enumerate(stage.blocks):
                x, attention = run_layer(_layer, block, x, hw)
                if number in chosen:
                    attentions.append(attention)
            if index in self.out_indices:
                feature = getattr(self, f'norm{index}')(x).unflatten(1, tuple(hw))
                features.append(feature.permute(0, 3, 1, 2).contiguous())
            if stage.downsample:
                x, hw = stage.downsample(x, hw)
        return features, tuple(attentions)


def _layer(layer: SwinBlock, x: Tensor, hw: GridSize) -> tuple[Tensor, WindowAttentionMap]:
    """One layer on (B, L, C)."""
    out, attention = _attend_in_windows(layer.attn, layer.norm1(x), hw)
    x = out + x
    return layer.ffn(layer.norm2(x), identity=x), attention


def _attend_in_windows(
    module: ShiftWindowMSA, x: Tensor, hw: GridSize
) -> tuple[Tensor, WindowAttentionMap]:
    """The result of ``module(x, hw)`` for tokens (B, L, C), and its attention map."""
    windows = Windows(hw, (module.window_size,) * 2, (module.shift_size,) * 2)
    # Keys outside the grid are padding, which in mmseg is 0 at the input of the projection.
    padded = F.pad(x, (0, 0, windows.extra_keys, 0))
    tokens = padded.index_select(1, windows.keys(x.device).flatten())
    out, attention = _attend(module.w_msa, tokens, windows)
    out = out.index_select(1, windows.slots(x.device)[windows.extra_keys :])
    return module.drop(out), attention


def _attend(module: WindowMSA, x: Tensor, windows: Windows) -> tuple[Tensor, WindowAttentionMap]:
    """The attention of the windows' tokens (B, count * tokens, C), computed in the same steps as in mmseg."""
    heads = module.num_heads
    packed = module.qkv(x.flatten(0, 1)).view(len(x), windows.count, windows.tokens, 3, heads, -1)
    query, key, value = packed.permute(3, 0, 1, 4, 2, 5)
    table = module.relative_position_bias_table[module.relative_position_index.flatten()]
    bias = table.view(windows.tokens, windows.tokens, heads).permute(2, 0, 1)
    mask = windows.mask(x.device)
    bias = bias if mask is None else bias + mask
    scores = module.softmax((query * module.scale) @ key.mT + bias)
    out = (module.attn_drop(scores) @ value).transpose(2, 3).reshape(x.shape)
    out = module.proj_drop(module.proj(out))
    return out, WindowAttentionMap(query, key, module.scale, windows, bias)
