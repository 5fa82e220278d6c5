# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The segmentor that is trained in a stage: mmseg's EncoderDecoder with a frozen old model beside it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import OptSampleList, SampleList, add_prefix
from torch import Tensor, nn

from mmseg_sats.models.heads.class_tensors import check_kind, class_tensors
from mmseg_sats.models.heads.classifier import grow_head, shape_mismatches
from mmseg_sats.models.heads.classifier_form import ClassifierForm
from mmseg_sats.models.heads.losses import head_losses
from mmseg_sats.models.heads.new_rows import NewRows, measured_classifier
from mmseg_sats.models.heads.split_classifier import AUXILIARY
from mmseg_sats.models.heads.unknown import fold_unknown
from mmseg_sats.models.losses.over_ranks import losses_over_ranks
from mmseg_sats.models.padding import labels_of_batch
from mmseg_sats.models.parts import DistillationPart, PseudoLabeler, check_flags, flag
from mmseg_sats.models.pixel_losses.image_weights import product_of_weights, weighted_images
from mmseg_sats.models.pixel_losses.shared import check_targets, shared_losses
from mmseg_sats.models.pseudo_labels.completion import complete_labels
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors.adaptive_weight import (
    adapt_weights,
    check_weights,
    without_weight,
)
from mmseg_sats.models.segmentors.checks import (
    check_left_out,
    check_losses,
    check_parts,
    check_start,
)
from mmseg_sats.models.segmentors.freeze import freeze, hold_in_eval
from mmseg_sats.models.segmentors.old_model import OldModel, run_segmentor
from mmseg_sats.models.segmentors.predictions import add_predictions
from mmseg_sats.protocol import UNKNOWN_LABEL
from mmseg_sats.utils.spelling import warn_renamed


@MODELS.register_module()
class IncrementalEncoderDecoder(EncoderDecoder):
    """EncoderDecoder with an old model, pseudo-labels and distillation.

    The loss of a stage is ``segmentation_loss(student, labels) + sum_d d(student, teacher, labels)``, where
    ``teacher`` is the output of the old model. The segmentation loss is the heads' own ``loss_decode``, on
    labels that the pseudo-labeler may have completed. Without an old model (stage 0), only the segmentation
    loss and the losses with ``needs_teacher = False`` are used.

    If a checkpoint's classifiers have ``old_model.num_old`` rows, new rows are added while it is loaded. Any
    other difference in shape raises an error; mmengine would only log it and keep random weights.

    Args:
        backbone: as in ``EncoderDecoder``; distilling attention needs one with ``forward_with_attention``.
        decode_head: as in ``EncoderDecoder``, a head on ``BaseDecodeHead``.
        old_model: ``dict(checkpoint=path, num_old=channels with background)`` of the previous
            stage's snapshot, or None in stage 0. It is read when a loss needs it for the first time, so a
            trained stage can be used for inference without it. If a part needs all teachers, ``earlier`` has the same
            of the stages before, the first stage's first.
        pseudo_labeler: config of a :class:`PseudoLabeler`, or of an object that is called in the same way;
            or None. It labels only the stage's own images: exemplars keep their labels.
        outside_labeler: the same for images from outside the data set, whose labels are all
            background.
        distillation: name to config of a :class:`DistillationPart`, or of another module that is called
            in the same way, or of an :class:`AdaptiveWeight` around it. The loss is logged as ``loss_<name>``. An entry
            None is left out, so that a child config can remove a part.
        classifier_init: how new classifier rows are initialised, ``'balanced'`` (MiB), ``'keep_background'``,
            ``'random'``, ``'unknown'`` (SSUL), ``'auxiliary'`` (DKD, which adds an auxiliary classifier of one channel
            to the decode head) or ``'future'`` (DFT*); or ``'similar'`` (SELECT), ``'attributed'`` (AWT) or
            ``'pretuned'`` (NeST), for which a run looks at the stage's images first. A dict adds options, see
            :class:`NewRows`.
        unknown: whether the heads have an unknown class beside their channels (SSUL), whose label in
            training is ``UNKNOWN_LABEL``. For the heads' losses it is an additional last class.
        future_classes: how many rows the heads have beside their channels for the classes of later stages. For the
            heads' losses they are additional last classes, which no pixel is labelled as; they are not predicted.
        split_classifier: whether ``conv_seg`` of the heads has its rows in parts ``background``, ``old`` and ``new``,
            which ``frozen`` can name, e.g. ``'decode_head.conv_seg.old'``. So it is with all other options that change
            the classifier, except for ``closed_form``.
        background_logit: background's logit in all heads, a constant (DKD, STAR): the prediction is background where
            no class's logit exceeds it, so 0.0 stands for a threshold of 0.5 on the classes' sigmoids. The
            heads' losses must leave channel 0 out. None for a background that is trained.
        background_residuals: residuals by which later stages lower the decode head's background (BARM), see
            ``ResidualClassifier``: the index of the stage, ``'$stage'`` in a config. 0 for none.
        closed_form: ``width`` and ``seed`` of a :class:`ClosedFormClassifier` as the decode head's ``conv_seg``,
            whose rows a ``ClosedFormHook`` computes; or None.
        prototypes: config of the :class:`ClassPrototypes` that are computed in training for losses
            that need them, or of the :class:`ReplayPrototypes` that are gathered at the end of a stage; or None.
        pixel_weights: config of the weights of pixels in the heads' losses, e.g.
            :class:`UncertaintyBalanceWeights`, from stage 1 on; or None. They multiply the labelers' weights of images.
        graph_old_model: whether a GPU runs the old model's pass in training from a CUDA graph, see
            :class:`GraphedPass`.
        frozen: patterns of the parts that are not trained and whose running statistics do not change,
            e.g. ``('backbone',)``; see ``mmseg_sats.models.segmentors.freeze``.
        **kwargs: ``neck``, ``auxiliary_head``, ``train_cfg``, ``test_cfg``, ``data_preprocessor``,
            ``pretrained`` and ``init_cfg`` of ``EncoderDecoder``; other arguments raise an error.

    Raises:
        TypeError: a head cannot grow, or not as an option asks for.
        ValueError: options do not go together, or not with the losses; a part needs attention maps that the backbone
            cannot compute, or has an unknown flag ``needs_...``; ``frozen`` matches nothing in the model; the weight of
            an :class:`AdaptiveWeight` cannot be measured; or with ``unknown``, a class or ``ignore_index`` is
            ``UNKNOWN_LABEL``.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        decode_head: dict[str, Any],
        *,
        old_model: dict[str, Any] | None = None,
        pseudo_labeler: dict[str, Any] | None = None,
        outside_labeler: dict[str, Any] | None = None,
        distillation: dict[str, dict[str, Any] | None] | None = None,
        classifier_init: str | Mapping[str, Any] = 'balanced',
        unknown: bool = False,
        future_classes: int = 0,
        split_classifier: bool = False,
        background_logit: float | None = None,
        background_residuals: int = 0,
        closed_form: dict[str, Any] | None = None,
        prototypes: dict[str, Any] | None = None,
        pixel_weights: dict[str, Any] | None = None,
        graph_old_model: bool = False,
        frozen: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        new_rows = NewRows(classifier_init)
        form = ClassifierForm(
            unknown=unknown,
            future_classes=future_classes,
            auxiliary=new_rows.name == AUXILIARY,
            background_residuals=background_residuals,
            closed_form=closed_form,
            background_logit=background_logit,
            split_classifier=split_classifier,
        )
        check_left_out(distillation or {})
        old_model = _with_current_names(old_model)
        self_cfg = copy.deepcopy(
            dict(backbone=backbone, decode_head=decode_head, neck=kwargs.get('neck'))
        )
        head_cfgs = copy.deepcopy(
            {'decode_head': decode_head} | _named('auxiliary_head', kwargs.get('auxiliary_head'))
        )
        for name, cfg in head_cfgs.items():
            check_kind(name, cfg)
        super().__init__(backbone=backbone, decode_head=decode_head, **kwargs)
        self.new_rows = new_rows
        self.pseudo_labeler = MODELS.build(pseudo_labeler) if pseudo_labeler else None
        self.outside_labeler = MODELS.build(outside_labeler) if outside_labeler else None
        parts = {name: cfg for name, cfg in (distillation or {}).items() if cfg is not None}
        self.distillation = nn.ModuleDict({name: MODELS.build(cfg) for name, cfg in parts.items()})
        for name, labeler in self._named_labelers():
            check_flags(name, labeler, PseudoLabeler)
        for name, part in self.distillation.items():
            check_flags(f'distillation.{name}', part, DistillationPart)
        num_old = old_model['num_old'] if old_model else 1
        check_parts(self, form, old_model, prototypes)
        check_start(new_rows, form, self.distillation)
        check_losses(form, self._named_heads())
        self._old_model: OldModel | None = None
        self._old_model_cfg = None
        if old_model:
            # Of a model with residuals, which are as many as stages before it.
            old_form = form.of_stage(max(background_residuals - 1, 0))
            own = dict(model_cfg=self_cfg, form=old_form, graphed=graph_old_model)
            self._old_model_cfg = dict(old_model, **own)
        sizes = dict(num_channels=self.num_classes)
        self.prototypes = MODELS.build(dict(prototypes, **sizes)) if prototypes is not None else None
        self.pixel_weights = MODELS.build(dict(pixel_weights, **sizes)) if pixel_weights else None
        self.unknown, self.future_classes = unknown, future_classes
        # By head, the tensors with a row for each class.
        self.class_tensors = {name: class_tensors(name, head, head_cfgs[name]) for name, head in self._named_heads()}
        self.measured_classifier = None
        if new_rows.measured is not None:
            tensors = self.class_tensors['decode_head']
            self.measured_classifier = measured_classifier(self.decode_head, tensors)
        for name, head in self._named_heads():
            self.class_tensors[name] |= form.shape(name, head, self.class_tensors[name], num_old)
        freeze(self, frozen)
        check_weights(self)
        self.frozen = tuple(frozen)

    def train(self, mode: bool = True) -> 'IncrementalEncoderDecoder':
        """As in ``nn.Module``, but frozen parts stay in eval mode."""
        super().train(mode)
        hold_in_eval(self, self.frozen)
        return self

    @property
    def old_model(self) -> OldModel | None:
        """The frozen old model, read from its snapshot on first use; None in stage 0."""
        if self._old_model is None and self._old_model_cfg is not None:
            self._old_model = OldModel.from_checkpoint(**self._old_model_cfg)
        return self._old_model

    @property
    def _labelers(self) -> dict[str, Any]:
        """The labelers of the images of each source; exemplars need none."""
        sources = dict(pseudo_labeler='stage', outside_labeler='outside')
        return {sources[name]: labeler for name, labeler in self._named_labelers()}

    def _named_labelers(self) -> Iterator[tuple[str, Any]]:
        for name in ('pseudo_labeler', 'outside_labeler'):
            if (labeler := getattr(self, name)) is not None:
                yield name, labeler

    def _named_heads(self) -> Iterator[tuple[str, nn.Module]]:
        yield 'decode_head', self.decode_head
        if self.with_auxiliary_head:
            yield from _named('auxiliary_head', self.auxiliary_head).items()

    def loss(self, inputs: Tensor, data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            inputs: preprocessed images (B, 3, H, W).
            data_samples: their labels, ``gt_sem_seg`` (1, H, W) each.

        Returns:
            Name to scalar; mmengine sums those whose name contains ``loss``. In a distributed run
            they are the losses of the whole batch, see ``mmseg_sats.models.losses.over_ranks``.
        """
        # Unknown pixels count as background, except in the heads' own losses.
        labels, unknown = self.without_unknown(labels_of_batch(data_samples))
        taught = self._is_taught()
        parts = {
            name: part
            for name, part in self.distillation.items()
            if taught or not flag(part, 'needs_teacher', DistillationPart)
        }
        asked = {f'with_{name}': _need(name, parts.values()) for name in ('attention', 'classifier')}
        # The old model runs first: its temporary memory is free again before the student keeps its activations.
        teacher = self.old_model.in_training(inputs, **asked) if taught else None
        if teacher is not None:
            teacher.earlier = tuple(model.in_training(inputs) for model in self.old_model.earlier)
        outputs = None
        if any(flag(labeler, 'needs_student', PseudoLabeler) for labeler in self._labelers.values()):
            outputs = run_segmentor(self, inputs, **asked)
        labels, weights = self._complete(labels, data_samples, outputs and outputs[0], teacher)
        # Unknown pixels that the labelers gave a class, or ignored as unsure, are no longer unknown.
        targets = labels.masked_fill(unknown & (labels == 0), self.num_classes)
        # Everything that must wait for results of the GPU is done here, while the GPU has little queued work.
        check_targets(self.decode_head, targets, self.num_classes + self.unknown)
        for part in parts.values():
            if hasattr(part, 'prepare'):  # a module that is no DistillationPart may lack it
                part.prepare(teacher, labels, self.num_classes)
        student, head_inputs = outputs or run_segmentor(self, inputs, **asked)
        if teacher is not None:  # DDRNet has a further map in training, before the one that it always has
            student.features = student.features[-len(teacher.features) :]
        if self.prototypes is not None:
            self.prototypes.update(student.features, labels)
            student.prototypes = self.prototypes
        weights += [
            part.image_weights(student, teacher, labels) for part in parts.values() if hasattr(part, 'image_weights')
        ]
        losses = self._losses(parts, student, head_inputs, teacher, labels, targets, product_of_weights(weights))
        heads = {_prefix(name): head for name, head in self._named_heads()}
        losses = losses_over_ranks(losses, heads, self.distillation, targets)
        return adapt_weights(self, losses, parts, labels, teacher)

    def _is_taught(self) -> bool:
        """Whether the old model is run. In stage 0, and by methods that do not use it, it is not even read."""
        used = len(self.distillation) > 0 or len(self._labelers) > 0 or self.pixel_weights is not None
        return self._old_model_cfg is not None and used

    def _complete(
        self,
        labels: Tensor,
        data_samples: SampleList,
        student: SegmentorOutput | None,
        teacher: SegmentorOutput | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The labels completed by the old model, and weights of images or of pixels in the heads' losses."""
        if teacher is None:
            return labels, []
        completed, of_images = complete_labels(labels, data_samples, self._labelers, student, teacher)
        if self.pixel_weights is None:
            return completed, [of_images]
        return completed, [of_images, self.pixel_weights(labels, completed, teacher)]

    def _losses(
        self,
        parts: Mapping[str, nn.Module],
        student: SegmentorOutput,
        head_inputs: tuple[Tensor, ...],
        teacher: SegmentorOutput | None,
        labels: Tensor,
        targets: Tensor,
        weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses of heads and parts; those of pixels that go well together are computed in one pass.

        Args:
            parts: of the distillation, by name.
            student: the model's output.
            head_inputs: the inputs of the heads.
            teacher: the old model's output, if it is run.
            labels: (B, H, W), completed.
            targets: (B, H, W), the same with K on unknown pixels, for the heads.
            weights: of images or pixels in the heads' losses.
        """
        plain = {name: without_weight(part) for name, part in parts.items()}
        shared = shared_losses(self.decode_head, plain, student, teacher, targets, weights)
        heads = dict(self._named_heads())
        losses = {name: value for name, value in shared.items() if name.startswith('decode.')}
        if losses:
            del heads['decode_head']
        with weighted_images(heads.values(), weights):
            losses.update(self._segmentation_losses(heads, student, head_inputs, targets))
        for name, part in parts.items():
            key = f'loss_{name}'
            losses[key] = shared[key] if key in shared else part(student, teacher, labels)
        return losses

    def without_unknown(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels in which unknown is replaced by background, and a mask of the unknown pixels, both (B, H, W).

        If the model has no unknown class, nothing is replaced: ``UNKNOWN_LABEL`` is then an ordinary label.
        """
        unknown = (labels == UNKNOWN_LABEL) & self.unknown
        return labels.masked_fill(unknown, 0), unknown

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Logits (B, K, H, W) at the images' size; with an unknown class, the scores of ``fold_unknown`` instead."""
        logits = super().encode_decode(inputs, batch_img_metas)
        return fold_unknown(logits) if self.unknown else logits[:, : self.out_channels]

    def _forward(self, inputs: Tensor, data_samples: SampleList | None = None) -> Tensor:
        """Logits (B, K, h, w) of the classes as in mmseg, without an unknown class and future ones."""
        output = super()._forward(inputs, data_samples)
        logits = output[0] if isinstance(output, tuple) else output  # some heads return more, e.g. EncHead
        return logits[:, : self.out_channels]

    def postprocess_result(self, seg_logits: Tensor, data_samples: OptSampleList = None) -> SampleList:
        """Adds logits and predicted classes to the samples, or to new ones; see :func:`add_predictions`."""
        if seg_logits.shape[1] == 1:
            return super().postprocess_result(seg_logits, data_samples)
        return add_predictions(seg_logits, data_samples, self.align_corners)

    def _segmentation_losses(
        self,
        heads: Mapping[str, nn.Module],
        student: SegmentorOutput,
        head_inputs: tuple[Tensor, ...],
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """The heads' own losses with mmseg's names, on completed labels (B, H, W), which are K on unknown pixels."""
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
        losses: dict[str, Tensor] = {}
        for name, head in heads.items():
            if name == 'decode_head':
                own = head_losses(head, student.head_output, samples)
            else:
                own = head.loss(head_inputs, samples, self.train_cfg)
            losses.update(add_prefix(own, _prefix(name)))
        return losses

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        if self._old_model_cfg is not None:
            for name, head in self._named_heads():
                decode_head = name == 'decode_head'
                grow_head(
                    state_dict,
                    f'{prefix}{name}.',
                    head,
                    self.class_tensors[name],
                    self._old_model_cfg['num_old'],
                    self.new_rows.grows_by(decode_head),
                    # Rows that are still to be made are scaled behind that.
                    self.new_rows.align_norms and not (decode_head and self.new_rows.measured is not None),
                )
        wrong = shape_mismatches(state_dict, self, prefix)
        if wrong:
            raise ValueError(
                'the checkpoint does not fit the model of this stage: ' + '; '.join(wrong[:5])
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _need(name: str, parts: Iterable[nn.Module]) -> bool:
    return any(flag(part, f'needs_{name}', DistillationPart) for part in parts)


def _with_current_names(old_model: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The options of the old model with their current names; an earlier version may have written the config."""
    if old_model is None or 'num_classes' not in old_model:
        return old_model
    warn_renamed('old_model.num_classes', 'old_model.num_old')
    options = dict(old_model)
    return dict(num_old=options.pop('num_classes'), **options)


def _prefix(name: str) -> str:
    """The prefix that mmseg gives to the losses of the head with this name."""
    short = dict(decode_head='decode').get(name, name)
    return short.replace('auxiliary_head', 'aux').replace('.', '_')


def _named(name: str, one_or_more: Any) -> dict[str, Any]:
    """Heads or their configs by their names in the segmentor; the heads of a list are numbered."""
    if isinstance(one_or_more, list | tuple | nn.ModuleList):
        return {f'{name}.{index}': item for index, item in enumerate(one_or_more)}
    return {} if one_or_more is None else {name: one_or_more}
