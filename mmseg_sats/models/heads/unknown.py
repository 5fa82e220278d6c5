# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""A classifier of separate parts, each of which can be frozen or trained, and rows beside the classes' channels.

These are SSUL's unknown class (Cha et al., "SSUL: Semantic Segmentation with Unknown Label for Exemplar-based
Class-Incremental Learning", NeurIPS 2021, sections 3.2 and 3.3), and the rows that wait for future classes.
"""

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


class SplitClassifier(nn.Module):
    """``conv_seg`` in parts: background, old classes, new classes, and rows that are no channels of the stage.

    Each part is a 1x1 convolution with its own parameters. So a part can be frozen, in which case
    momentum and weight decay do not change it either, or have its own learning rate. This is not
    possible for rows of a single tensor.

    The ``state_dict`` is that of mmseg's ``conv_seg``, one ``weight`` and ``bias`` with a row per
    channel, plus ``unknown.weight``, ``future.weight`` and their biases, if there are such rows. So a snapshot can be
    loaded into mmseg's own heads, and into a classifier with other parts. (An EMA with ``update_buffers=True``
    averages the tensors of ``state_dict``, which are copies here: keep mmengine's default, False.)

    Args:
        in_channels: channels of the features.
        num_channels: K, background included, without the rows beside them.
        num_old: channels of the old model, background included; 1 in stage 0.
        unknown: whether there is a row for the unknown class.
        future: how many rows there are for classes of later stages.

    Attributes:
        sizes: the parts of the K channels, by name, and their rows.
        extra: the same of the rows beside them.
    """

    def __init__(
        self, in_channels: int, num_channels: int, num_old: int, unknown: bool = True, future: int = 0
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = num_channels
        sizes = dict(background=1, old=num_old - 1, new=num_channels - num_old)
        self.sizes = {name: size for name, size in sizes.items() if size}
        self.extra = {name: size for name, size in dict(unknown=int(unknown), future=future).items() if size}
        for name, size in (self.sizes | self.extra).items():
            self.add_module(name, nn.Conv2d(in_channels, size, 1))
        self._register_state_dict_hook(_join_parts)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K + E, h, w) of features (B, in_channels, h, w); those of the E rows of ``extra`` are the last."""
        pieces = [self.get_submodule(name) for name in (*self.sizes, *self.extra)]
        weight = torch.cat([piece.weight for piece in pieces])
        return nn.functional.conv2d(x, weight, torch.cat([piece.bias for piece in pieces]))

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        # The parts are loaded after this call, by their own names.
        for kind in ('weight', 'bias'):
            rows = state_dict.get(f'{prefix}{kind}')
            if rows is not None and rows.shape[0] == self.out_channels:
                del state_dict[f'{prefix}{kind}']
                cut = rows.split(list(self.sizes.values()))
                names = [f'{prefix}{name}.{kind}' for name in self.sizes]
                state_dict.update(zip(names, cut, strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _join_parts(
    module: SplitClassifier, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
) -> None:
    for kind in ('weight', 'bias'):
        rows = [state_dict.pop(f'{prefix}{name}.{kind}') for name in module.sizes]
        state_dict[f'{prefix}{kind}'] = torch.cat(rows)


def split_classifier(head: nn.Module, num_old: int, unknown: bool = True, future: int = 0) -> None:
    """Replaces the ``conv_seg`` of an mmseg head by a :class:`SplitClassifier`.

    Args:
        head: a head on ``BaseDecodeHead``. Its output then has more channels, for the rows beside the K channels.
        num_old: channels of the old model, background included; 1 in stage 0.
        unknown: whether there is a row for the unknown class.
        future: how many rows there are for classes of later stages.
    """
    conv_seg = head.conv_seg
    head.conv_seg = SplitClassifier(conv_seg.in_channels, conv_seg.out_channels, num_old, unknown, future)


def check_only_conv_seg(option: str, name: str, head: nn.Module, tensors: Iterable[str]) -> None:
    """Raises TypeError if a head's classifier cannot be replaced, since more than ``conv_seg`` depends on its classes.

    Args:
        option: that asks for another classifier, for the message.
        name: the head's name in the segmentor, for the message.
        head: a decode or auxiliary head.
        tensors: the names of those with a row for each class.
    """
    others = [key for key in tensors if not key.startswith('conv_seg.')]
    if others or not isinstance(getattr(head, 'conv_seg', None), nn.Conv2d):
        raise TypeError(
            f'{option}: {name} ({type(head).__name__}) cannot have another classifier: expected a head in which the '
            f'classifier conv_seg alone has a row for each class, found {", ".join(others)}'
        )


def fold_unknown(logits: Tensor) -> Tensor:
    """The scores of the classes, as in SSUL's evaluation.

    Args:
        logits: (B, K + 1, H, W), the unknown class last.

    Returns:
        (B, K, H, W): the sigmoid of each class; in channel 0, background's plus the unknown class's.
    """
    scores = logits.sigmoid()
    background = scores[:, :1] + scores[:, -1:]
    return torch.cat([background, scores[:, 1:-1]], dim=1)
