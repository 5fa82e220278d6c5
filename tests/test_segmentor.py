# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""IncrementalEncoderDecoder: the frozen old model, the sum of the parts, and what it shares with mmseg."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import OHEMPixelSampler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_sats.engine.hooks import PseudoLabelThresholdHook
from mmseg_sats.models.losses import crp_loss, label_guided_distillation, unbiased_distillation
from mmseg_sats.models.segmentor_output import SegmentorOutput
from mmseg_sats.models.segmentors import IncrementalEncoderDecoder, cuda_graph, old_model
from mmseg_sats.models.segmentors.cuda_graph import Pass
from mmseg_sats.models.segmentors.old_model import OldModel, run_segmentor
from tests.small_models import (
    CROSS_ENTROPY,
    MIT,
    MIT_CHANNELS,
    auxiliary_head_cfg,
    build,
    images,
    model_cfg,
    samples,
    save_weights,
)

NUM_OLD = 4
ATTENTION = dict(type='CRPDistillationLoss', loss_weight=20.0)
OUTPUT = dict(type='UnbiasedDistillationLoss', loss_weight=10.0)
SATS = dict(
    pseudo_labeler=dict(type='EntropyPseudoLabeler', threshold=0.5),
    distillation=dict(attention=ATTENTION, output=OUTPUT),
)
FEATURES = dict(distillation=dict(feature=dict(ATTENTION, source='feature')))


@pytest.fixture
def snapshot(tmp_path: Path) -> str:
    """A snapshot of an old model with ``NUM_OLD`` channels, each of which wins somewhere."""
    model = build(model_cfg(NUM_OLD)).eval()
    conv_seg = model.decode_head.conv_seg
    with torch.no_grad():
        logits = model(images(), mode='tensor')
        conv_seg.bias -= logits.mean((0, 2, 3))
        factor = 3 / logits.std((0, 2, 3))
        conv_seg.weight *= factor[:, None, None, None]
        conv_seg.bias *= factor
        assert len(model(images(), mode='tensor').argmax(1).unique()) == NUM_OLD
    return save_weights(model, tmp_path / 'snapshot.pth')


def later_stage(
    checkpoint: str, num_classes: int = 6, resnet: bool = False, **options: Any
) -> IncrementalEncoderDecoder:
    old_model = dict(checkpoint=checkpoint, num_old=NUM_OLD)
    return build(model_cfg(num_classes, resnet, old_model=old_model, **options), seed=7)


def block_labels(height: int = 64, width: int = 64) -> Tensor:
    """Two label maps (2, H, W): background, the new classes 4 and 5, an old class 2, and ignore."""
    labels = torch.zeros(2, height, width, dtype=torch.long)
    labels[0, : height // 2, : width // 2] = 4
    labels[0, height // 2 :, width // 2 :] = 5
    labels[1, : height // 3] = 2
    labels[1, -2:] = 255
    return labels


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    return sum(value for name, value in losses.items() if 'loss' in name)


def train_a_little(model: IncrementalEncoderDecoder, steps: int = 2) -> None:
    optimizer = dict(type='SGD', lr=0.01)
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    for _ in range(steps):
        wrapper.update_params(total_loss(model.loss(images(), samples(block_labels()))))


# What is asked before the student's forward pass


def test_a_label_without_a_channel_is_named(snapshot: str) -> None:
    for model in (build(model_cfg(6)), later_stage(snapshot, **SATS)):
        labels = block_labels()
        labels[0, :3] = model.num_classes
        with pytest.raises(ValueError, match=rf'0\.\.{model.num_classes - 1} .* got \[{model.num_classes}\]'):
            model.train().loss(images(), samples(labels))


def test_parts_prepare_before_the_students_forward_pass(
    snapshot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = later_stage(snapshot, **SATS).train()
    attention, order = model.distillation['attention'], []
    prepare, forward = attention.prepare, model.backbone.forward_with_attention

    def prepared(teacher: SegmentorOutput, labels: Tensor, num_classes: int) -> None:
        assert teacher.logits.shape[1] == NUM_OLD
        assert num_classes == model.num_classes
        order.append('prepare')
        prepare(teacher, labels, num_classes)

    def seen(inputs: Tensor) -> Any:
        order.append('student')
        return forward(inputs)

    monkeypatch.setattr(attention, 'prepare', prepared)
    monkeypatch.setattr(model.backbone, 'forward_with_attention', seen)
    expected = model.loss(images(), samples(block_labels()))
    assert order == ['prepare', 'student']
    # Without it the same comes out.
    monkeypatch.setattr(attention, 'prepare', lambda *args: None)
    found = model.loss(images(), samples(block_labels()))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# The old model


def test_the_old_model_is_bitwise_the_same_after_training(snapshot: str) -> None:
    model = later_stage(snapshot, **SATS)
    student = copy.deepcopy(model.state_dict())
    before = copy.deepcopy(model.old_model.model.state_dict())
    output = model.old_model(images()).logits
    train_a_little(model.train())
    after = model.old_model.model.state_dict()
    saved = torch.load(snapshot, weights_only=True)['state_dict']
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(after[key], saved[key]) for key in before)
    assert torch.equal(model.old_model(images()).logits, output)
    # The student did move: its weights, and its batch norm's running means.
    moved = model.state_dict()
    assert not torch.equal(moved['decode_head.conv_seg.weight'], student['decode_head.conv_seg.weight'])
    mean = 'decode_head.fusion_conv.bn.running_mean'
    assert not torch.equal(moved[mean], student[mean])


def test_the_old_model_stays_in_eval_mode_and_frozen(snapshot: str) -> None:
    model = later_stage(snapshot, **SATS)
    old = model.old_model.model
    model.train()
    model.loss(images(), samples(block_labels()))
    assert model.training
    assert not any(module.training for module in old.modules())
    assert not any(parameter.requires_grad for parameter in old.parameters())
    total_loss(model.loss(images(), samples(block_labels()))).backward()
    assert all(parameter.grad is None for parameter in old.parameters())
    model.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in old.parameters())


def test_the_old_model_is_no_part_of_the_module(snapshot: str) -> None:
    plain = build(model_cfg(6))
    model = later_stage(snapshot, **SATS)
    old = model.old_model.model
    assert list(model.state_dict()) == list(plain.state_dict())
    own = {id(module) for module in model.modules()}
    assert not any(id(module) in own for module in old.modules())
    old_storage = {tensor.data_ptr() for tensor in old.state_dict().values()}
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.data_ptr() in old_storage for tensor in tensors)


def test_averaged_copies_share_the_old_model(snapshot: str) -> None:
    model = later_stage(snapshot, **SATS)
    old = model.old_model
    average = ExponentialMovingAverage(model, momentum=0.5)
    assert average.module._old_model is old
    assert average.module is not model
    old_storage = {tensor.data_ptr() for tensor in old.model.state_dict().values()}
    assert not any(tensor.data_ptr() in old_storage for tensor in average.state_dict().values())
    assert len(average.module.state_dict()) == len(model.state_dict())
    before = {key: value.clone() for key, value in old.model.state_dict().items()}
    train_a_little(model.train(), steps=1)
    average.update_parameters(model)
    average.update_parameters(model)
    assert all(torch.equal(value, before[key]) for key, value in old.model.state_dict().items())


def test_the_optimizer_has_the_students_parameters_alone(snapshot: str) -> None:
    model = later_stage(snapshot, **SATS)
    assert model.old_model is not None
    for paramwise in (None, dict(custom_keys=dict(head=dict(lr_mult=5.0)))):
        wrapper = build_optim_wrapper(
            model,
            dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1), paramwise_cfg=paramwise),
        )
        given = [parameter for group in wrapper.optimizer.param_groups for parameter in group['params']]
        assert {id(p) for p in given} == {id(p) for p in model.parameters()}
        assert len(given) == len(list(model.parameters()))


def test_the_old_model_needs_no_auxiliary_heads(tmp_path: Path) -> None:
    old = build(model_cfg(NUM_OLD, auxiliary_head=auxiliary_head_cfg(NUM_OLD)))
    path = save_weights(old, tmp_path / 'snapshot.pth')
    model = later_stage(path, auxiliary_head=auxiliary_head_cfg(6), **SATS)
    assert not any('auxiliary' in key for key in model.old_model.model.state_dict())
    torch.testing.assert_close(model.old_model(images()).logits, old.eval()(images(), mode='tensor'))
    train_a_little(model.train(), steps=1)


def test_the_old_model_needs_nothing_of_the_students_loss(snapshot: str) -> None:
    cfg = model_cfg(6, old_model=dict(checkpoint=snapshot, num_old=NUM_OLD), **SATS)
    cfg['decode_head'] = ConfigDict(cfg['decode_head'])  # as a config file gives it
    cfg['decode_head'].loss_decode = ConfigDict(type='UnbiasedCrossEntropyLoss', num_old=NUM_OLD)
    train_a_little(build(cfg).train(), steps=1)


def test_the_old_models_head_has_the_channels_of_its_own_classes(snapshot: str) -> None:
    cfg = model_cfg(6)
    cfg['decode_head'].update(out_channels=6, align_corners=True)
    old = OldModel.from_checkpoint(
        dict(backbone=cfg['backbone'], decode_head=cfg['decode_head']), NUM_OLD, snapshot)
    output = old(images())
    assert output.logits.shape[1] == NUM_OLD
    assert output.align_corners  # as its head resizes


def test_the_old_model_of_a_sync_bn_student_runs_on_a_cpu(snapshot: str) -> None:
    cfg = model_cfg(6, old_model=dict(checkpoint=snapshot, num_old=NUM_OLD), **SATS)
    cfg['decode_head']['norm_cfg'] = dict(type='SyncBN')
    old = build(cfg).old_model
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in old.model.modules())
    expected = later_stage(snapshot, **SATS).old_model(images()).logits
    torch.testing.assert_close(old(images()).logits, expected)


# Stage 0 is mmseg's


def stock_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of mmseg's own segmentor: the additions of this project taken out."""
    cfg = copy.deepcopy(cfg)
    for key in ('old_model', 'pseudo_labeler', 'distillation', 'classifier_init'):
        cfg.pop(key, None)
    if cfg['backbone']['type'] == 'AttentionMixVisionTransformer':
        cfg['backbone'] = dict(MIT, type='MixVisionTransformer')
    return cfg | dict(type='EncoderDecoder')


def stock_model(model: IncrementalEncoderDecoder, cfg: dict[str, Any]) -> EncoderDecoder:
    stock = MODELS.build(stock_cfg(cfg))
    assert type(stock) is EncoderDecoder
    stock.load_state_dict(model.state_dict(), strict=True)
    return stock


AUXILIARY: dict[str, Any] = {
    'none': None,
    'single': auxiliary_head_cfg(6),
    'list': [auxiliary_head_cfg(6), auxiliary_head_cfg(6, 2)],
}


@pytest.mark.parametrize('auxiliary', AUXILIARY)
def test_stage_0_has_the_losses_of_mmseg(auxiliary: str) -> None:
    cfg = model_cfg(6, auxiliary_head=AUXILIARY[auxiliary], **SATS)
    model = build(cfg)
    stock = stock_model(model, cfg)
    batch = images(height=40, width=48), samples(block_labels(40, 48))
    expected, losses = stock.train().loss(*batch), model.train().loss(*batch)
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert expected['decode.loss_ce'] > 0.1


def test_stage_0_has_the_gradients_of_mmseg() -> None:
    cfg = model_cfg(6, auxiliary_head=auxiliary_head_cfg(6))
    model = build(cfg)
    stock = stock_model(model, cfg)
    for each in (model, stock):
        total_loss(each.train().loss(images(), samples(block_labels()))).backward()
    for (name, own), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_behind_a_neck_heads_of_both_kinds_have_the_losses_of_mmseg() -> None:
    neck = dict(type='FPN', in_channels=MIT_CHANNELS, out_channels=8, num_outs=4)
    cfg = model_cfg(6, neck=neck, auxiliary_head=auxiliary_head_cfg(6) | dict(in_channels=8))
    cfg['decode_head'].update(in_channels=[8] * 4)
    model = build(cfg)
    batch = images(), samples(block_labels())
    expected = stock_model(model, cfg).train().loss(*batch)
    losses = model.train().loss(*batch)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_a_later_stage_without_parts_has_the_losses_of_mmseg_and_reads_no_old_model() -> None:
    cfg = model_cfg(6, old_model=dict(checkpoint='/nowhere/snapshot.pth', num_old=NUM_OLD),
                    distillation=dict(), pseudo_labeler=None)
    model = build(cfg)
    batch = images(), samples(block_labels())
    expected = stock_model(model, cfg).train().loss(*batch)
    losses = model.train().loss(*batch)
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses['decode.loss_ce'], expected['decode.loss_ce'])


@pytest.mark.parametrize('resnet', [False, True])
def test_a_snapshot_is_served_by_stock_mmseg(snapshot: str, resnet: bool) -> None:
    cfg = model_cfg(6, resnet, old_model=dict(checkpoint=snapshot, num_old=NUM_OLD),
                    **(FEATURES if resnet else SATS))
    model = build(cfg).eval()
    stock = stock_model(model, cfg).eval()
    with torch.no_grad():
        for size in ((32, 32), (41, 57)):
            x = images(1, *size)
            own, theirs = model(x, mode='tensor'), stock(x, mode='tensor')
            torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)
            predicted = [each(x, mode='predict')[0].seg_logits.data for each in (model, stock)]
            torch.testing.assert_close(*predicted, atol=1e-5, rtol=0)
    assert own.std() > 0.1


# The sum of the parts


def output_of(model: EncoderDecoder) -> SegmentorOutput:
    features, attentions = model.backbone.forward_with_attention(images())
    return SegmentorOutput(model.decode_head(features), tuple(features), attentions)


def upsample(logits: Tensor) -> Tensor:
    return F.interpolate(logits, (64, 64), mode='bilinear', align_corners=False)


def pseudo_labels_by_hand(labels: Tensor, old_logits: Tensor, thresholds: list[float]) -> Tensor:
    """PLOP's rule, pixel by pixel."""
    labels, probabilities = labels.clone(), upsample(old_logits).softmax(1)
    for b, y, x in (labels == 0).nonzero().tolist():
        q = probabilities[b, :, y, x].double()
        entropy = -(q * q.log()).sum().item() / math.log(len(q))
        old = int(q.argmax())
        labels[b, y, x] = old if entropy < thresholds[old] else 255
    return labels


def cross_entropy_by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the labelled pixels, divided by all of them."""
    return F.cross_entropy(upsample(logits), labels, ignore_index=255, reduction='sum') / labels.numel()


@pytest.mark.parametrize('thresholds', [None, [0.9, 0.1, 0.6, 0.3]], ids=['fixed', 'per class'])
def test_the_loss_is_the_sum_of_its_parts(snapshot: str, thresholds: list[float] | None) -> None:
    parts = SATS['distillation'] | dict(guided=dict(type='LabelGuidedDistillationLoss', loss_weight=3.0))
    model = later_stage(snapshot, auxiliary_head=auxiliary_head_cfg(6), **SATS | dict(distillation=parts)).train()
    if thresholds is not None:
        model.pseudo_labeler.thresholds = torch.tensor(thresholds)
    losses = model.loss(images(), samples(block_labels()))

    old = build(model_cfg(NUM_OLD)).eval()
    old.load_state_dict(torch.load(snapshot, weights_only=True)['state_dict'])
    with torch.no_grad():
        teacher = output_of(old)
    student = output_of(model)
    labels = pseudo_labels_by_hand(block_labels(), teacher.logits, thresholds or [0.5] * NUM_OLD)
    background = block_labels() == 0
    assert (labels[background] == 255).any()
    assert ((labels[background] > 0) & (labels[background] < NUM_OLD)).any()
    assert torch.equal(labels[~background], block_labels()[~background])

    expected = {
        'decode.loss_ce': cross_entropy_by_hand(student.logits, labels),
        'aux.loss_ce': 0.4 * cross_entropy_by_hand(model.auxiliary_head(student.features), labels),
        'loss_attention': 20 * crp_loss(student.attentions, teacher.attentions, labels),
        'loss_output': 10 * unbiased_distillation(upsample(student.logits), upsample(teacher.logits)),
        # By the annotations, whatever the labeler ignored or filled.
        'loss_guided': 3 * label_guided_distillation(
            upsample(student.logits), upsample(teacher.logits), block_labels()
        ),
    }
    assert set(losses) == {*expected, 'decode.acc_seg', 'aux.acc_seg'}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-4, msg=name)
        assert value > 0.01, name
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total, sum(expected.values()), atol=1e-4, rtol=1e-4)


def test_a_labeler_that_is_a_mere_function_needs_no_thresholds(snapshot: str, tmp_path: Path) -> None:
    model = later_stage(snapshot, **SATS)
    model.pseudo_labeler = lambda labels, logits: labels
    PseudoLabelThresholdHook().before_train(SimpleNamespace(model=model, work_dir=str(tmp_path / 'run')))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('gpu', [False, True])
def test_the_old_model_can_be_run_from_a_graph_on_a_gpu(
    snapshot: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here as if there were one, whose graphs count what they run; without one the option changes nothing."""
    counts = Counter()

    def capture(run: Pass, inputs: Tensor) -> Pass:
        counts['captured'] += 1

        def replay(images: Tensor) -> SegmentorOutput:
            counts['replayed'] += 1
            return run(images)

        return replay

    if gpu:
        monkeypatch.setattr(old_model, 'has_graphs', lambda device: True)
        monkeypatch.setattr(cuda_graph, 'capture_cuda_graph', capture)
    earlier = [dict(checkpoint=snapshot, num_old=NUM_OLD)]
    usual, graphed = (
        build(model_cfg(6, old_model=dict(earlier[0], earlier=earlier), **options, **SATS), seed=7)
        for options in ({}, dict(graph_old_model=True))
    )
    for number in range(4):
        batch = images() + number, samples(block_labels())
        expected, losses = usual.loss(*batch), graphed.loss(*batch)
        assert losses.keys() == expected.keys()
        assert all(torch.equal(losses[name], expected[name]) for name in losses)
    # Of both old models: the comparison behind the second batch, and the third and fourth batch.
    assert counts == (dict(captured=2, replayed=2 * 3) if gpu else {})
    graphed.double().loss(images().double(), samples(block_labels()))
    assert not graphed.old_model.graphed_pass.captured


def test_the_parts_see_the_labels_of_the_pseudo_labeler(snapshot: str) -> None:
    """Without pseudo-labels, only the classes of the annotation are pooled."""
    parts = dict(distillation=dict(attention=ATTENTION))
    batch = images(), samples(block_labels())
    plain = later_stage(snapshot, **parts).train().loss(*batch)
    labelled = later_stage(snapshot, **parts, pseudo_labeler=SATS['pseudo_labeler']).train().loss(*batch)
    assert plain['loss_attention'] != labelled['loss_attention']
    assert plain['decode.loss_ce'] != labelled['decode.loss_ce']


def plop(model: IncrementalEncoderDecoder) -> IncrementalEncoderDecoder:
    model.pseudo_labeler.scale_images = True
    return model.train()


AUXILIARY_LOSSES = {
    'cross entropy': CROSS_ENTROPY,
    'unbiased': dict(type='UnbiasedCrossEntropyLoss', num_old=NUM_OLD),
    'sigmoid': dict(type='SigmoidCrossEntropyLoss'),
}


@pytest.mark.parametrize('loss', AUXILIARY_LOSSES)
def test_images_are_weighed_in_the_segmentation_losses_of_all_heads(snapshot: str, loss: str) -> None:
    heads = [auxiliary_head_cfg(6) | dict(loss_decode=AUXILIARY_LOSSES[loss]), auxiliary_head_cfg(6, 2)]
    model = plop(later_stage(snapshot, auxiliary_head=heads, **SATS))
    # In train mode a step moves no weight, and without dropout it can be repeated.
    losses = model.loss(images(), samples(block_labels()))

    teacher = model.old_model(images()).logits
    labels = pseudo_labels_by_hand(block_labels(), teacher, [0.5] * NUM_OLD)
    background = block_labels() == 0
    share = [((labels[i] != 255) & background[i]).sum().item() / background[i].sum().item() for i in (0, 1)]
    assert 0 < share[0] != share[1] < 1
    features = model.backbone(images())
    for name, head in (('decode', model.decode_head), ('aux_0', model.auxiliary_head[0]),
                       ('aux_1', model.auxiliary_head[1])):
        logits, total = upsample(head(features)), 0.0
        for i in (0, 1):
            total += share[i] * head.loss_decode(logits[i : i + 1], labels[i : i + 1], ignore_index=255)
        torch.testing.assert_close(losses[f'{name}.loss_ce'], total / 2, atol=1e-5, rtol=1e-4, msg=name)
        assert total > 0.01
        assert head.sampler is None
    # The parts are what they were.
    plain = later_stage(snapshot, auxiliary_head=heads, **SATS).train().loss(images(), samples(block_labels()))
    for name, value in plain.items():
        same = torch.allclose(losses[name], value)
        assert same != name.endswith('loss_ce'), name


def test_a_heads_own_sampler_keeps_its_say(snapshot: str) -> None:
    model = plop(later_stage(snapshot, **SATS))
    model.decode_head.sampler = sampler = OHEMPixelSampler(model.decode_head, thresh=0.05, min_kept=100)
    loss = model.loss(images(), samples(block_labels()))['decode.loss_ce']
    labels = model.pseudo_labeler(block_labels(), upsample(model.old_model(images()).logits))
    logits = upsample(model.decode_head(model.backbone(images())))
    weights = model.pseudo_labeler.image_weights(block_labels(), labels)[:, None, None]
    kept = sampler.sample(logits, labels[:, None])
    pixels = F.cross_entropy(logits, labels, ignore_index=255, reduction='none')
    torch.testing.assert_close(loss, (pixels * kept * weights).mean(), atol=1e-5, rtol=1e-4)
    assert model.decode_head.sampler is sampler
    # Neither of them alone gives that loss.
    for part in (pixels * kept, pixels * weights):
        assert (part.mean() - loss).abs() > 0.01


def test_a_head_that_cannot_weigh_images_is_named(snapshot: str) -> None:
    model = plop(later_stage(snapshot, **SATS))
    model.decode_head.loss_by_feat = lambda logits, data_samples: dict(loss_ce=logits.sum())
    with pytest.raises(TypeError, match=r'SegformerHead does not weigh pixels.*scale_images=False'):
        model.loss(images(), samples(block_labels()))
    assert model.decode_head.sampler is None


def test_the_annotation_itself_is_left_as_it_is(snapshot: str) -> None:
    data_samples = samples(block_labels())
    later_stage(snapshot, **SATS).loss(images(), data_samples)
    kept = torch.cat([sample.gt_sem_seg.data for sample in data_samples])
    assert torch.equal(kept, block_labels())


def test_a_none_entry_is_left_out(snapshot: str) -> None:
    model = later_stage(snapshot, distillation=dict(attention=None, output=OUTPUT)).train()
    losses = model.loss(images(), samples(block_labels()))
    assert [name for name in losses if name.startswith('loss_')] == ['loss_output']
    assert list(model.distillation) == ['output']


def test_a_student_that_is_the_old_model_has_nothing_to_learn_from_it(tmp_path: Path) -> None:
    old = build(model_cfg(NUM_OLD))
    path = save_weights(old, tmp_path / 'snapshot.pth')
    model = later_stage(path, num_classes=NUM_OLD, distillation=dict(attention=ATTENTION))
    model.load_state_dict(old.state_dict())
    losses = model.eval().loss(images(), samples(block_labels().clamp(max=3)))
    assert losses['loss_attention'].item() == pytest.approx(0, abs=1e-4)


def test_features_of_any_backbone_can_be_distilled(tmp_path: Path) -> None:
    old = build(model_cfg(NUM_OLD, resnet=True))
    path = save_weights(old, tmp_path / 'snapshot.pth')
    model = later_stage(path, resnet=True, **FEATURES).train()
    losses = model.loss(images(), samples(block_labels()))
    with torch.no_grad():
        teacher = old.eval().backbone(images())
    expected = 20 * crp_loss(model.backbone(images()), teacher, block_labels())
    torch.testing.assert_close(losses['loss_feature'], expected, atol=1e-4, rtol=1e-4)
    assert expected > 0.1
    losses['loss_feature'].backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


# Errors


@pytest.mark.parametrize('source', ['attention', 'both'])
def test_attention_of_a_backbone_without_any_is_refused_at_build(source: str) -> None:
    parts = dict(distillation=dict(attention=dict(ATTENTION, source=source)))
    with pytest.raises(ValueError, match=r"backbone ResNet .*source='feature'"):
        later_stage('never read', resnet=True, **parts)
    with pytest.raises(ValueError, match='backbone MixVisionTransformer '):
        build(model_cfg(6, **parts) | dict(backbone=dict(MIT, type='MixVisionTransformer')))


def test_a_missing_old_snapshot_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / 'stage_0' / 'snapshot.pth')
    model = later_stage(path, **SATS)
    with pytest.raises(FileNotFoundError, match=path):
        model.loss(images(), samples(block_labels()))


def test_an_old_snapshot_with_other_classes_is_named(tmp_path: Path) -> None:
    path = save_weights(build(model_cfg(3)), tmp_path / 'snapshot.pth')
    model = later_stage(path, **SATS)
    with pytest.raises(ValueError, match=rf'{path}.*4 channels.*decode_head\.conv_seg\.weight: \(3, 8, 1, 1\)'):
        model.loss(images(), samples(block_labels()))


def test_an_old_snapshot_that_lacks_tensors_is_named(tmp_path: Path) -> None:
    weights = build(model_cfg(NUM_OLD)).state_dict()
    del weights['backbone.layers.3.2.bias']
    torch.save(dict(meta={}, state_dict=weights), tmp_path / 'snapshot.pth')
    model = later_stage(str(tmp_path / 'snapshot.pth'), **SATS)
    with pytest.raises(ValueError, match=r'backbone\.layers\.3\.2\.bias: missing'):
        model.loss(images(), samples(block_labels()))


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match='distilation'):
        build(model_cfg(6, distilation=dict()))
    with pytest.raises(ValueError, match='classifier_init'):
        build(model_cfg(6, classifier_init='balance'))


def test_without_an_unknown_class_254_is_a_label_like_any_other() -> None:
    losses = {
        label: build(model_cfg(255)).loss(images(), samples(torch.full((2, 64, 64), label)))
        for label in (0, 254)
    }
    assert losses[254]['decode.loss_ce'] > 1
    assert losses[254]['decode.loss_ce'] != losses[0]['decode.loss_ce']
    cfg = model_cfg(6)
    cfg['decode_head']['ignore_index'] = 254
    assert build(cfg).loss(images(), samples(torch.full((2, 64, 64), 254)))['decode.loss_ce'] == 0
    for refused in (cfg, model_cfg(255)):
        with pytest.raises(ValueError, match='label 254 stands for the unknown class'):
            build(dict(refused, unknown=True, classifier_init='unknown'))


# Whole steps at the edges


def edge_cases() -> dict[str, Callable[[], Tensor]]:
    def one_pixel() -> Tensor:
        labels = torch.zeros(2, 32, 32, dtype=torch.long)
        labels[0, 17, 5] = NUM_OLD
        return labels

    return {
        'all background': lambda: torch.zeros(2, 32, 32, dtype=torch.long),
        'all ignore': lambda: torch.full((2, 64, 64), 255),
        'no background': lambda: torch.full((2, 64, 64), NUM_OLD),
        'one image': lambda: block_labels()[:1].clamp(max=NUM_OLD),
        'odd and wide': lambda: block_labels(33, 71).clamp(max=NUM_OLD)[:1],
        'odd and tall': lambda: torch.where(block_labels(67, 37) == 255, 255, NUM_OLD),
        'class on one pixel': one_pixel,
    }


def finite_step(model: IncrementalEncoderDecoder, labels: Tensor) -> dict[str, Tensor]:
    batch, height, width = labels.shape
    losses = model.train().loss(images(batch, height, width), samples(labels))
    total_loss(losses).backward()
    for name, value in losses.items():
        assert torch.isfinite(value).all(), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert {'loss_attention', 'loss_output', 'decode.loss_ce'} <= set(losses)
    return losses


@pytest.mark.parametrize('num_new', [1, 30])
@pytest.mark.parametrize('case', edge_cases())
def test_a_step_at_the_edge_is_finite(snapshot: str, case: str, num_new: int) -> None:
    model = later_stage(snapshot, NUM_OLD + num_new, **SATS)
    losses = finite_step(model, edge_cases()[case]())
    if case == 'all ignore':
        assert losses['decode.loss_ce'] == 0
        assert losses['loss_attention'] == 0
        assert losses['loss_output'] > 0


@pytest.mark.parametrize('case', ['all background', 'all ignore'])
def test_without_a_class_there_is_no_attention_to_transfer(snapshot: str, case: str) -> None:
    model = later_stage(snapshot, distillation=SATS['distillation'])
    assert finite_step(model, edge_cases()[case]())['loss_attention'] == 0


def test_a_labeler_that_is_never_sure_leaves_only_the_new_classes(snapshot: str) -> None:
    labeler = dict(type='EntropyPseudoLabeler', threshold=1e-9)
    model = later_stage(snapshot, **SATS | dict(pseudo_labeler=labeler))
    assert finite_step(model, edge_cases()['all background']())['decode.loss_ce'] == 0


@pytest.mark.parametrize('loss', [CROSS_ENTROPY, dict(type='UnbiasedCrossEntropyLoss', num_old=NUM_OLD)])
def test_a_step_runs_under_autocast(snapshot: str, loss: dict[str, Any]) -> None:
    model = later_stage(snapshot, **SATS)
    model.decode_head.loss_decode = MODELS.build(loss)
    exact = copy.deepcopy(model).train().loss(images(), samples(block_labels()))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.train().loss(images(), samples(block_labels()))
    total_loss(losses).backward()
    for name in ('decode.loss_ce', 'loss_attention', 'loss_output'):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.15), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.decode_head.conv_seg.weight.grad.dtype == torch.float32


def test_the_old_model_gives_no_graph(snapshot: str) -> None:
    old: OldModel = later_stage(snapshot, **SATS).old_model
    output = old(images().requires_grad_(), with_attention=True)
    assert not output.logits.requires_grad
    assert not any(attention.query.requires_grad for attention in output.attentions)
    assert len(output.attentions) == len(output.features) == 4
    assert old(images()).attentions == ()


def tensors(output: SegmentorOutput) -> list[Tensor]:
    maps = [tensor for own in output.attentions for tensor in (own.query, own.key)]
    return [output.logits, *output.features, *maps]


class Casts(TorchDispatchMode):
    """Counts what is cast."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_under_autocast_the_old_models_weights_are_cast_once(snapshot: str) -> None:
    old: OldModel = later_stage(snapshot, **SATS).old_model
    plain = tensors(old(images(), with_attention=True))
    counts = []
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16), Casts() as casts:
            found = tensors(old(images(), with_attention=True))
        counts.append(casts.count)
        with torch.autocast('cpu', torch.bfloat16), torch.no_grad(), Casts() as casts:
            output, _ = run_segmentor(old.model, images(), with_attention=True)
        for one, other in zip(found, tensors(output), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    # The first call makes the copy and compares; then activations alone are cast.
    assert counts[1] == counts[2] < casts.count / 2
    assert all(p.dtype == torch.float32 for p in old.model.parameters())
    for one, other in zip(plain, tensors(old(images(), with_attention=True)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize('damage', ['normalised', 'dtype'])
def test_an_old_model_that_does_more_with_its_weights_is_run_as_it_is(
    snapshot: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    old: OldModel = later_stage(snapshot, **SATS).old_model

    def classify(head: nn.Module, features: Tensor) -> Tensor:
        weight, bias = head.conv_seg.weight, head.conv_seg.bias
        if damage == 'dtype':
            with torch.autocast('cpu', enabled=False):
                return F.conv2d(features.float(), weight, bias)
        return F.conv2d(features, 3 * F.normalize(weight, dim=1), bias)

    monkeypatch.setattr(type(old.model.decode_head), 'cls_seg', classify)
    for _ in range(2):
        with torch.autocast('cpu', torch.bfloat16):
            found = old(images()).logits
            with torch.no_grad():
                expected = run_segmentor(old.model, images(), with_attention=False)[0].logits
        assert torch.equal(found, expected)


def test_the_old_model_goes_where_the_images_are_and_is_left_alone_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``Module.to`` goes through every tensor, which is milliseconds of every step."""
    moved = []
    model = nn.Conv2d(3, 2, 1)
    monkeypatch.setattr(model, 'to', lambda device, dtype: moved.append((device.type, dtype)))
    monkeypatch.setattr(old_model, 'run_segmentor', lambda model, inputs: [inputs])
    old = old_model.OldModel(model)
    old(torch.zeros(1, 3, 2, 2))
    assert moved == []
    old(torch.zeros(1, 3, 2, 2, device='meta'))
    assert moved == [('meta', torch.float32)]
    old(torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    assert moved[1:] == [('cpu', torch.float64)]
    old(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16))  # as autocast may leave them
    assert len(moved) == 2
