# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Original SegFormer MiT checkpoints under the parameter names of mmseg's encoder."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmseg_sats.utils.checkpoint import load_checkpoint_safely, write_atomically


def _linear_to_conv(tensor: Tensor) -> Tensor:
    """Linear weight (out, in) as that of a 1x1 convolution (out, in, 1, 1); a bias stays."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Rule(NamedTuple):
    """Parameters whose original name matches ``pattern`` get the name ``target``.

    Args:
        pattern: of the whole original name.
        target: the template of mmseg's name, filled with the stage, from 0 on, and the pattern's
            named groups.
        convert: from the original tensor to mmseg's.
    """

    pattern: str
    target: str
    convert: Callable[[Tensor], Tensor] = _same


_BLOCK = r'block(?P<stage>\d+)\.(?P<layer>\d+)\.'
_KIND = r'\.(?P<kind>weight|bias)'
RULES = (
    _Rule(
        r'patch_embed(?P<stage>\d+)\.proj' + _KIND,
        'layers.{stage}.0.projection.{kind}',
    ),
    _Rule(r'patch_embed(?P<stage>\d+)\.norm' + _KIND, 'layers.{stage}.0.norm.{kind}'),
    _Rule(r'norm(?P<stage>\d+)' + _KIND, 'layers.{stage}.2.{kind}'),
    _Rule(
        _BLOCK + r'(?P<name>norm1|norm2|attn\.sr|attn\.norm)' + _KIND,
        'layers.{stage}.1.{layer}.{name}.{kind}',
    ),
    _Rule(_BLOCK + r'attn\.proj' + _KIND, 'layers.{stage}.1.{layer}.attn.attn.out_proj.{kind}'),
    _Rule(
        _BLOCK + r'mlp\.fc1' + _KIND,
        'layers.{stage}.1.{layer}.ffn.layers.0.{kind}',
        _linear_to_conv,
    ),
    _Rule(_BLOCK + r'mlp\.dwconv\.dwconv' + _KIND, 'layers.{stage}.1.{layer}.ffn.layers.1.{kind}'),
    _Rule(
        _BLOCK + r'mlp\.fc2' + _KIND,
        'layers.{stage}.1.{layer}.ffn.layers.4.{kind}',
        _linear_to_conv,
    ),
)
# The two halves of mmseg's packed projection, in its order.
_PROJECTIONS = (_BLOCK + r'attn\.q' + _KIND, _BLOCK + r'attn\.kv' + _KIND)
_PACKED = 'layers.{stage}.1.{layer}.attn.attn.in_proj_{kind}'
_DROPPED = r'head\.(weight|bias)'
SHOWN = 5


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the original MiT under mmseg's names.

    Args:
        state_dict: the original parameters.

    Raises:
        KeyError: if a name is unknown, or of a query and key-value projection one is missing; the
            message names such keys.
        ValueError: if the names are mmseg's already, or no parameter is an encoder's.
    """
    if state_dict and all(re.match(r'layers\.\d', name) for name in state_dict):
        raise ValueError("the names are mmseg's already: use the file as it is")
    converted: dict[str, Tensor] = {}
    halves: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for name, tensor in state_dict.items():
        half = _match_first(_PROJECTIONS, name)
        rule = _match_first([rule.pattern for rule in RULES], name)
        if half is not None:
            halves.setdefault(_target(_PACKED, half[1]), {})[half[0]] = tensor
        elif rule is not None:
            converted[_target(RULES[rule[0]].target, rule[1])] = RULES[rule[0]].convert(tensor)
        elif not re.fullmatch(_DROPPED, name):
            unknown.append(name)
    if unknown:
        more = f' and {len(unknown) - SHOWN} more' if unknown[SHOWN:] else ''
        raise KeyError(f'not parameters of an original MiT: {", ".join(unknown[:SHOWN])}{more}')
    if not converted:
        raise ValueError('it holds no parameter of an original MiT encoder')
    return converted | _pack(halves)


def _match_first(patterns: list[str] | tuple[str, ...], name: str) -> tuple[int, re.Match] | None:
    for index, pattern in enumerate(patterns):
        match = re.fullmatch(pattern, name)
        if match:
            return index, match
    return None


def _target(template: str, match: re.Match) -> str:
    groups = match.groupdict()
    return template.format(**groups | {'stage': int(groups['stage']) - 1})


def _pack(halves: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """Join query and key-value projections (C, C) and (2C, C) to (3C, C), with a bias (3C,)."""
    incomplete = [name for name, parts in halves.items() if len(parts) < len(_PROJECTIONS)]
    if incomplete:
        raise KeyError(f'attn.q or attn.kv is missing for {", ".join(incomplete)}')
    packed = {name: torch.cat([parts[0], parts[1]]) for name, parts in halves.items()}
    # mmseg's qkv_bias=False takes the output projection's bias away too, which the original keeps:
    # a projection without bias becomes one whose bias is 0.
    biases = {
        name.removesuffix('weight') + 'bias': tensor.new_zeros(len(tensor))
        for name, tensor in packed.items()
        if name.endswith('weight')
    }
    return biases | packed


def load(path: Path) -> Mapping[str, Tensor]:
    """Read the parameters of a checkpoint file, with or without a ``state_dict`` level.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of plain tensors.
    """
    state_dict = load_checkpoint_safely(path)['state_dict']
    if not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise ValueError(f'{path} must hold a dict of tensors')
    return state_dict


def save(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write ``dict(state_dict=...)``; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {'state_dict': dict(state_dict)}
    write_atomically(path, lambda file: torch.save(content, file))
