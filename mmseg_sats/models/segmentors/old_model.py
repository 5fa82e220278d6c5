# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The frozen old model of a stage, and the function that runs a segmentor for all losses at once."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmseg.models import EncoderDecoder
from torch import Tensor

from mmseg_sats.models.heads.classifier import shape_mismatches
from mmseg_sats.models.heads.classifier_form import ClassifierForm
from mmseg_sats.models.heads.linear_classifier import seen_classifier
from mmseg_sats.models.heads.split_classifier import UNKNOWN
from mmseg_sats.models.segmentor_output import NOT_ASKED_FOR, SegmentorOutput
from mmseg_sats.models.segmentors.cast_weights import autocast_dtype, with_cast_weights
from mmseg_sats.models.segmentors.cuda_graph import GraphedPass, has_graphs
from mmseg_sats.utils.checkpoint import load_checkpoint_safely


def run_segmentor(
    model: EncoderDecoder, inputs: Tensor, with_attention: bool = False, with_classifier: bool = False
) -> tuple[SegmentorOutput, tuple[Tensor, ...]]:
    """Runs a segmentor once and returns everything that losses may need.

    Args:
        model: any mmseg ``EncoderDecoder``.
        inputs: preprocessed images (B, 3, H, W).
        with_attention: whether to return the backbone's attention maps; the backbone must then have
            ``forward_with_attention``.
        with_classifier: whether to return the decode head's classifier and its input; the head must then end in
            ``conv_seg``.

    Returns:
        The output (logits (B, K, h, w) at the head's resolution, the encoder's feature maps, the
        attention maps) and the head's inputs (after the neck, if there is one), for auxiliary heads.
    """
    attentions = NOT_ASKED_FOR
    if with_attention:
        features, attentions = model.backbone.forward_with_attention(inputs)
        attentions = tuple(attentions)
    else:
        features = model.backbone(inputs)
    head_inputs = model.neck(features) if model.with_neck else features
    with seen_classifier(model.decode_head) if with_classifier else nullcontext([None]) as classifiers:
        output = model.decode_head(head_inputs)
    logits, *more = output if isinstance(output, tuple) else (output,)
    beside = {}
    if logits.shape[1] > model.out_channels:  # see SplitClassifier
        logits, extra = logits[:, : model.out_channels], logits[:, model.out_channels :]
        beside = {model.decode_head.conv_seg.beside: extra}
    # Some backbones, e.g. DDRNet, return a single map outside of training.
    features = (features,) if isinstance(features, Tensor) else tuple(features)
    return SegmentorOutput(
        logits, features, attentions, model.align_corners, **beside, more=tuple(more), last_layer=classifiers[-1]
    ), head_inputs


class OldModel:
    """The frozen model as it stood after the previous stage.

    Under autocast, a copy is used whose weights are cast only once. So changes to ``model`` after its
    first use under autocast have no effect.

    It is not an ``nn.Module`` on purpose: as an attribute of the student, it then is no part of its
    ``state_dict``, optimizer, EMA and DDP wrapper, and ``train()`` does not affect it. Copies of the
    student share it.

    Args:
        model: the old segmentor; it is put in eval mode and frozen.
        earlier: those of the stages before it, the first stage's first, if a part needs them.
        graphed: whether ``in_training`` may use a CUDA graph.

    Attributes:
        graphed_pass: what ``in_training`` then calls.
    """

    def __init__(self, model: EncoderDecoder, earlier: 'Sequence[OldModel]' = (), graphed: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.earlier = tuple(earlier)
        self.graphed = graphed
        self.graphed_pass = GraphedPass()
        self._cast: dict[tuple[torch.device, torch.dtype], EncoderDecoder] = {}

    @classmethod
    def from_checkpoint(
        cls,
        model_cfg: dict[str, Any],
        num_old: int,
        checkpoint: str,
        form: ClassifierForm | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
        graphed: bool = False,
    ) -> 'OldModel':
        """Builds the old model from the student's own config and the previous stage's snapshot.

        Args:
            model_cfg: ``backbone``, ``decode_head`` and, if any, ``neck`` of the student.
            num_old: channels of the old model, background included.
            checkpoint: path of the snapshot.
            form: of its classifier; mmseg's own if not given.
            earlier: ``num_old`` and ``checkpoint`` of the models of the stages before.
            graphed: as in :class:`OldModel`, of the earlier ones too.

        Raises:
            ValueError: the snapshot lacks tensors or has some of another shape.
        """
        form = form or ClassifierForm()
        before = [
            cls.from_checkpoint(model_cfg, form=form.of_stage(stage), graphed=graphed, **own)
            for stage, own in enumerate(earlier)
        ]
        model_cfg = copy.deepcopy(model_cfg)
        head = model_cfg['decode_head']
        # Assigned by key, because mmengine's ConfigDict.update would merge the arguments of both losses.
        head['num_classes'], head['loss_decode'] = num_old, dict(type='CrossEntropyLoss')
        head.pop('out_channels', None)
        for key in ('init_cfg', 'pretrained'):
            model_cfg['backbone'].pop(key, None)
        model = revert_sync_batchnorm(EncoderDecoder(**model_cfg))
        form.shape('decode_head', model.decode_head, (), num_old)
        state_dict = load_checkpoint_safely(checkpoint)['state_dict']
        missing = [key for key in model.state_dict() if key not in state_dict]
        wrong = [f'{key}: missing' for key in missing] + shape_mismatches(state_dict, model)
        if wrong:
            raise ValueError(
                f'{checkpoint} does not hold the old model of this stage '
                f'({num_old} channels): ' + '; '.join(wrong[:5])
            )
        # Only the old model's tensors are loaded: the snapshot also has auxiliary heads, which it does not need.
        model.load_state_dict({key: state_dict[key] for key in model.state_dict()})
        return cls(model, before, graphed)

    @torch.no_grad()
    def __call__(self, inputs: Tensor, **asked: bool) -> SegmentorOutput:
        """The old model's output for images (B, 3, H, W), without gradients; ``asked`` as in :func:`run_segmentor`."""
        # The student's .to() and .double() do not move the old model, so it is moved here, but only if needed:
        # Module.to visits every tensor.
        own = next(self.model.parameters())
        # Only float64 changes the model's dtype; lower precisions are left to autocast.
        dtype = inputs.dtype if torch.float64 in (own.dtype, inputs.dtype) else own.dtype
        if (own.device, own.dtype) != (inputs.device, dtype):
            self.model.to(inputs.device, dtype)
            self._cast.clear()
            self.graphed_pass.forget()
        lower = autocast_dtype(inputs.device)
        if lower is None or dtype != torch.float32:
            return run_segmentor(self.model, inputs, **asked)[0]
        if (inputs.device, lower) not in self._cast:
            return self._run_and_cast(inputs, lower, asked)
        return run_segmentor(self._cast[inputs.device, lower], inputs, **asked)[0]

    def in_training(self, inputs: Tensor, **asked: bool) -> SegmentorOutput:
        """As a call, for batches that mostly have one shape: on a GPU from a CUDA graph, if ``graphed`` is set.

        The output is then valid until the next call, and hooks of the model's modules are not called.
        """
        if not self.graphed or not has_graphs(inputs.device):
            return self(inputs, **asked)
        kind = (autocast_dtype(inputs.device), *sorted(asked.items()))
        return self.graphed_pass(lambda images: self(images, **asked), inputs, kind)

    def on_test_images(self, inputs: Tensor, test_cfg: Mapping[str, Any] | None) -> SegmentorOutput:
        """The output for images of any size, as the model is tested: in windows, or the whole images at once.

        Args:
            inputs: preprocessed images (B, 3, H, W).
            test_cfg: the segmentor's. With ``mode='slide'`` the logits are (B, K, H, W) and without features,
                the mean over the windows as in mmseg's prediction.
        """
        if (test_cfg or {}).get('mode') != 'slide':
            return self(inputs)
        logits = EncoderDecoder.slide_inference(_Windows(self, test_cfg), inputs, [{}])
        known = self.model.out_channels
        unknown = logits[:, known:] if logits.shape[1] > known else None
        return SegmentorOutput(logits[:, :known], (), align_corners=self.model.align_corners, unknown=unknown)

    def _run_and_cast(
        self, inputs: Tensor, dtype: torch.dtype, asked: Mapping[str, bool]
    ) -> SegmentorOutput:
        """Makes the copy for autocast. If its output is not exactly the same, the model itself is used instead.

        The output can differ if a model uses a weight for more than a multiplication.
        """
        expected = run_segmentor(self.model, inputs, **asked)[0]
        try:
            faster = with_cast_weights(self.model, dtype)
            same = expected.equals(run_segmentor(faster, inputs, **asked)[0])
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation with tensors of different dtypes
            same = False
        if not same:
            print_log(
                'The old model gives other numbers with its weights cast once for autocast, so they '
                'are cast in every step, which takes longer.',
                logger='current',
            )
        self._cast[inputs.device, dtype] = faster if same else self.model
        return expected

    def __deepcopy__(self, memo: dict) -> 'OldModel':
        # EMA copies the student; a frozen model needs no second copy.
        return self


class ClassifierInputs:
    """The inputs of the old model's classifier, at the head's resolution.

    Args:
        old_model: the old model.
        classifier: the classifier's name in its decode head.
    """

    def __init__(self, old_model: OldModel, classifier: str) -> None:
        self.old_model = old_model
        self.classifier = old_model.model.decode_head.get_submodule(classifier)

    @property
    def weight(self) -> Tensor:
        """(K_o, d), the classifier's, on the device of the last images."""
        return self.classifier.weight.flatten(1)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, d, h, w) of preprocessed images (B, 3, H, W)."""
        seen: list[Tensor] = []
        handle = self.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self.old_model(inputs)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise RuntimeError(
                f'{type(self.old_model.model.decode_head).__name__} calls its classifier {len(seen)} times for an '
                'image: expected once, so that its inputs can be measured'
            )
        return seen[0].detach()


class _Windows:
    """What ``EncoderDecoder.slide_inference`` asks of a segmentor, for an old model with its unknown class."""

    def __init__(self, old_model: OldModel, test_cfg: Mapping[str, Any]) -> None:
        self.old_model = old_model
        self.test_cfg = ConfigDict(test_cfg)
        model = old_model.model
        classifier = getattr(model.decode_head, 'conv_seg', None)
        self.out_channels = model.out_channels + hasattr(classifier, UNKNOWN)

    def encode_decode(self, inputs: Tensor, _: Any) -> Tensor:
        """Logits of a window at its size."""
        output = self.old_model(inputs)
        return F.interpolate(
            output.trained_logits, inputs.shape[2:], mode='bilinear', align_corners=output.align_corners
        )

