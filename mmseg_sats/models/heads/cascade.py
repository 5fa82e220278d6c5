# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The heads of mmseg's ``CascadeEncoderDecoder`` (OCRNet) as a single decode head."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModule
from mmseg.registry import MODELS
from mmseg.utils import SampleList, add_prefix
from torch import Tensor

CASCADE = 'CascadeEncoderDecoder'


@MODELS.register_module()
class CascadeHead(BaseModule):
    """Heads in a row, each of which gets the logits of the one before. The last one gives the prediction.

    The names of the parameters are those in a ``CascadeEncoderDecoder``, so its checkpoints fit.

    Args:
        heads: their configs. The first is an ordinary head, the others are based on ``BaseCascadeDecodeHead``.
        num_classes: channels of each head.
        loss_decode: the loss of each head. Heads before the last have it at their own ``loss_weight``.
        init_cfg: as in ``BaseModule``.
    """

    # mmseg's heads weigh pixels by it; here each head has its own.
    sampler = None

    def __init__(
        self,
        heads: Sequence[Mapping[str, Any]],
        num_classes: int,
        loss_decode: Any = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        for index, head in enumerate(cascade_heads(heads, num_classes, loss_decode)):
            self.add_module(str(index), MODELS.build(head))
        last = self._heads[-1]
        self.num_classes = self.out_channels = num_classes
        self.align_corners, self.ignore_index, self.threshold = last.align_corners, last.ignore_index, None

    @property
    def _heads(self) -> list[BaseModule]:
        return list(self.children())

    @property
    def loss_decode(self) -> BaseModule:
        """The loss of the last head."""
        return self._heads[-1].loss_decode

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits (B, K, h, w) of the last head, and then those of the others in their order."""
        first, *others = self._heads
        outputs = [first(inputs)]
        for head in others:
            outputs.append(head(inputs, outputs[-1]))
        return outputs[-1], *outputs[:-1]

    def predict(self, inputs: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: Any) -> Tensor:
        """Logits (B, K, H, W) at the images' size, as in mmseg."""
        return self._heads[-1].predict_by_feat(self(inputs)[0], batch_img_metas)

    def loss_by_feat(self, output: tuple[Tensor, ...], batch_data_samples: SampleList) -> dict[str, Tensor]:
        """The losses of all heads, with their numbers before the names."""
        last, *others = output
        losses: dict[str, Tensor] = {}
        for index, (head, logits) in enumerate(zip(self._heads, (*others, last), strict=True)):
            losses |= add_prefix(head.loss_by_feat(logits, batch_data_samples), str(index))
        return losses


def cascade_heads(
    heads: Sequence[Mapping[str, Any]], num_classes: int, loss_decode: Any = None
) -> list[dict[str, Any]]:
    """The configs of the heads of a :class:`CascadeHead`, whose arguments these are, as mmseg has them."""
    found = []
    for index, head in enumerate(heads):
        own = dict(copy.deepcopy(dict(head)), num_classes=num_classes)
        own.pop('out_channels', None)
        if loss_decode is not None:
            loss, before = copy.deepcopy(loss_decode), own.get('loss_decode')
            if index < len(heads) - 1 and isinstance(loss, Mapping) and isinstance(before, Mapping):
                loss = dict(loss, loss_weight=before.get('loss_weight', 1.0))
            own['loss_decode'] = loss
        found.append(own)
    return found


def join_cascade(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config of mmseg's ``CascadeEncoderDecoder`` as one with a single decode head; of other models as it is."""
    model = dict(model)
    if model.get('type') == CASCADE and isinstance(model.get('decode_head'), list | tuple):
        model.pop('num_stages', None)
        heads = [dict(head) for head in model['decode_head']]
        last = heads[-1]
        model['decode_head'] = dict(
            type='CascadeHead', heads=heads, num_classes=last.get('num_classes'), loss_decode=last.get('loss_decode')
        )
    return model


def part_cascade(model: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`join_cascade`."""
    model = dict(model)
    head = dict(model['decode_head'])
    if head.pop('type') == 'CascadeHead':
        head.pop('init_cfg', None)
        heads = cascade_heads(**head)
        model.update(type=CASCADE, num_stages=len(heads), decode_head=heads)
    return model
