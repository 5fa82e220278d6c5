# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""The unknown class and the classifier in pieces: served, grown, frozen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from mmseg_sats.models.heads.split_classifier import SplitClassifier
from mmseg_sats.models.heads.unknown import fold_unknown
from mmseg_sats.protocol import UNKNOWN_LABEL
from tests.small_models import auxiliary_head_cfg, build, images, model_cfg, samples, save_weights

NUM_OLD, NUM_NEW = 4, 6
LOSS = dict(type='OneVsRestLoss')
LATER = Config.fromfile(Path(__file__).parents[1] / 'configs/ssul/ssul.py').method_later_stages
CLASSIFIER = 'decode_head.conv_seg'


def ssul_cfg(num_classes: int, resnet: bool = False, **options: Any) -> dict[str, Any]:
    cfg = model_cfg(num_classes, resnet, unknown=True, classifier_init='unknown', **options)
    cfg['decode_head'] |= dict(loss_decode=LOSS, dropout_ratio=0.5)
    cfg['backbone'] |= {} if resnet else dict(drop_rate=0.3)
    return cfg


def next_stage(tmp_path: Path, resnet: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model of a stage, and that of the stage after as it begins."""
    old = build(ssul_cfg(NUM_OLD, resnet))
    path = save_weights(old, tmp_path / 'old.pth')
    later = dict(
        frozen=LATER.model.frozen,
        pseudo_labeler=dict(type='SigmoidPseudoLabeler'),
        old_model=dict(checkpoint=path, num_old=NUM_OLD),
    )
    new = build(ssul_cfg(NUM_NEW, resnet, **later | options), seed=1)
    load_checkpoint(new, path)
    return old, new


def labels_with_unknown() -> Tensor:
    labels = torch.randint(NUM_OLD, NUM_NEW, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    labels[:, :40] = 0
    labels[:, 20:40] = UNKNOWN_LABEL
    labels[:, :, :5] = 255
    return labels


def test_the_state_dict_is_that_of_one_convolution() -> None:
    conv, split = nn.Conv2d(5, NUM_NEW, 1), SplitClassifier(5, NUM_NEW, NUM_OLD, 'unknown')
    weights = dict(conv.state_dict()) | {
        'unknown.weight': torch.randn(1, 5, 1, 1), 'unknown.bias': torch.randn(1)}  # fmt: skip
    split.load_state_dict(weights, strict=True)
    assert split.sizes == dict(background=1, old=3, new=2)
    saved = split.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    features = torch.randn(2, 5, 3, 4)
    logits = split(features)
    assert logits.shape == (2, NUM_NEW + 1, 3, 4)
    torch.testing.assert_close(logits[:, :-1], conv(features))
    torch.testing.assert_close(logits[:, -1:], split.unknown(features))
    elsewhere = SplitClassifier(5, NUM_NEW, 1, 'unknown')
    elsewhere.load_state_dict(saved)
    torch.testing.assert_close(elsewhere(features), logits)
    with pytest.raises(RuntimeError, match='weight'):
        SplitClassifier(5, NUM_NEW + 1, 1, 'unknown').load_state_dict(saved)


def test_unknown_is_added_to_background_and_dropped() -> None:
    scores = torch.tensor([[0.4, 0.7, 0.2, 0.35], [0.4, 0.7, 0.2, 0.25]], dtype=torch.float64)
    folded = fold_unknown(scores.logit().T[None, :, None])
    torch.testing.assert_close(
        folded[0, :, 0].T, torch.tensor([[0.75, 0.7, 0.2], [0.65, 0.7, 0.2]], dtype=torch.float64)
    )
    assert folded.argmax(1).flatten().tolist() == [0, 1]


@pytest.mark.parametrize('mode', [
    ConfigDict(mode='whole'), ConfigDict(mode='slide', crop_size=(48, 48), stride=(32, 32))])
def test_predictions_have_the_classes_channels(mode: ConfigDict) -> None:
    model = build(ssul_cfg(NUM_OLD, test_cfg=mode)).eval()
    with torch.no_grad():
        (result, _) = model.predict(images())
        raw = model.decode_head(model.extract_feat(images()))
        assert torch.equal(model(images(), mode='tensor'), raw[:, :NUM_OLD])
    assert raw.shape[1] == NUM_OLD + 1
    assert result.seg_logits.data.shape == (NUM_OLD, 64, 64)
    assert result.pred_sem_seg.data.max() < NUM_OLD
    if mode.mode == 'whole':
        large = nn.functional.interpolate(raw, (64, 64), mode='bilinear')
        torch.testing.assert_close(result.seg_logits.data, fold_unknown(large)[0])


def test_stock_mmseg_reads_a_snapshot(tmp_path: Path) -> None:
    _, model = next_stage(tmp_path)
    cfg = ssul_cfg(NUM_NEW)
    cfg['decode_head']['loss_decode'] = dict(type='CrossEntropyLoss')
    cfg['backbone']['type'] = 'MixVisionTransformer'
    for key in ('type', 'unknown', 'classifier_init'):
        cfg.pop(key)
    stock = EncoderDecoder(**cfg).eval()
    result = stock.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    assert sorted(result.unexpected_keys) == [f'{CLASSIFIER}.unknown.{x}' for x in ('bias', 'weight')]
    with torch.no_grad():
        torch.testing.assert_close(
            stock(images(), mode='tensor'), model.eval()(images(), mode='tensor'), rtol=0, atol=1e-5
        )


def test_new_rows_begin_as_unknown(tmp_path: Path) -> None:
    old, new = (model.state_dict() for model in next_stage(tmp_path))
    for kind in ('weight', 'bias'):
        rows = new[f'{CLASSIFIER}.{kind}']
        assert rows.shape[0] == NUM_NEW
        assert torch.equal(rows[:NUM_OLD], old[f'{CLASSIFIER}.{kind}'])
        unknown = old[f'{CLASSIFIER}.unknown.{kind}']
        assert torch.equal(rows[NUM_OLD:], unknown.expand_as(rows[NUM_OLD:]))
        assert torch.equal(new[f'{CLASSIFIER}.unknown.{kind}'], unknown)
    assert all(torch.equal(old[key], new[key]) for key in old if CLASSIFIER not in key)


def test_a_start_without_unknown_is_named(tmp_path: Path) -> None:
    path = save_weights(build(model_cfg(NUM_OLD)), tmp_path / 'old.pth')
    model = build(ssul_cfg(NUM_NEW, old_model=dict(checkpoint=path, num_old=NUM_OLD)))
    with pytest.raises(ValueError, match=r"classifier_init='unknown' needs .* rows decode_head\.conv_seg\.unknown"):
        load_checkpoint(model, path)


@pytest.mark.parametrize('resnet', [False, True])
@pytest.mark.parametrize('optimizer', [
    dict(type='SGD', lr=0.5, momentum=0.9, weight_decay=0.1, nesterov=True),
    dict(type='AdamW', lr=0.5, weight_decay=0.1)])
def test_nothing_frozen_moves_by_a_bit(
    tmp_path: Path, resnet: bool, optimizer: dict[str, Any]
) -> None:
    _, model = next_stage(tmp_path, resnet)
    before = copy.deepcopy(model.state_dict())
    wrapper = build_optim_wrapper(model, dict(optimizer=optimizer, **LATER.optim_wrapper))
    model.train()
    for step in range(3):
        losses = model.loss(images(seed=step), samples(labels_with_unknown()))
        wrapper.update_params(model.parse_losses(losses)[0])
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    kinds = ('weight', 'bias')
    assert moved == {f'{CLASSIFIER}.{piece}{kind}' for piece in ('', 'unknown.') for kind in kinds}
    for kind in kinds:
        one, other = (state[f'{CLASSIFIER}.{kind}'] for state in (before, after))
        rows = (one != other).flatten(1).any(1) if one.dim() > 1 else one != other
        # Background and new rows have learned; the old classes' have not.
        assert rows.tolist() == [True] + [False] * (NUM_OLD - 1) + [True] * (NUM_NEW - NUM_OLD)
        steps = (one - other).abs().flatten(1).amax(1) if one.dim() > 1 else (one - other).abs()
        assert 0 < steps[0] < 1e-3 * steps[NUM_OLD:].min()


def test_background_learns_at_a_rate_of_its_own(tmp_path: Path) -> None:
    _, model = next_stage(tmp_path)
    cfg = dict(optimizer=dict(type='SGD', lr=0.5, weight_decay=0.1), **LATER.optim_wrapper)
    wrapper = build_optim_wrapper(model, cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(g['params'][0])]: g['lr'] for g in wrapper.optimizer.param_groups}
    expected = dict(new=0.5, unknown=0.5, background=0.5e-4)
    assert rates == {
        f'{CLASSIFIER}.{piece}.{kind}': pytest.approx(rate)
        for piece, rate in expected.items() for kind in ('weight', 'bias')
    }  # fmt: skip


def test_training_mode_is_evaluation_but_for_the_classifiers(tmp_path: Path) -> None:
    """No dropout, no batch statistics: the frozen part gives the old model's features."""
    _, model = next_stage(tmp_path)
    expected = model.eval().decode_head(model.extract_feat(images()))
    assert torch.equal(model.train().decode_head(model.extract_feat(images())), expected)
    awake = build(ssul_cfg(NUM_OLD)).train()
    outputs = [awake.decode_head(awake.extract_feat(images())) for _ in range(2)]
    assert not torch.equal(*outputs)


def seen_targets(model: nn.Module, labels: Tensor) -> Tensor:
    """The labels (B, H, W) that the head's loss is given."""
    seen = []
    model.decode_head.loss_decode.register_forward_pre_hook(lambda part, args: seen.append(args[1]))
    model.loss(images(labels.shape[0]), samples(labels))
    return seen[0]


def set_classifier(model: nn.Module, biases: list[float]) -> None:
    """A model that says the same everywhere: the classes' logits, the unknown class's last."""
    classifier = model.decode_head.conv_seg
    names = [f'unknown.{kind}' for kind in ('weight', 'bias')]
    state = {key: torch.zeros_like(value) for key, value in classifier.state_dict().items()}
    state['bias'], state[names[1]] = torch.tensor(biases[:-1]), torch.tensor(biases[-1:])
    classifier.load_state_dict(state)


@pytest.mark.parametrize(('biases', 'background'), [
    ([-5.0, 3.0, -5.0, -5.0, -5.0], 1),  # sure of class 1
    ([-5.0, 0.5, -5.0, -5.0, -5.0], 0),  # not sure
    ([5.0, 3.0, -5.0, -5.0, -5.0], 0),  # background is surer
    ([-5.0, 3.0, -5.0, -5.0, 4.0], 0),  # the unknown class is surer
])
def test_pseudo_labels_heed_the_old_models_unknown_class(
    tmp_path: Path, biases: list[float], background: int
) -> None:
    _, model = next_stage(tmp_path)
    set_classifier(model.old_model.model, biases)
    labels = labels_with_unknown()
    targets = seen_targets(model, labels)
    expected = labels.masked_fill(labels == 0, background)
    # Without a pseudo-label, unknown is the last of the heads' outputs.
    expected[labels == UNKNOWN_LABEL] = background or NUM_NEW
    assert torch.equal(targets, expected)


def test_distillation_sees_unknown_as_background(tmp_path: Path) -> None:
    part = dict(output=dict(type='UnbiasedDistillationLoss'))
    _, model = next_stage(tmp_path, distillation=part, pseudo_labeler=None)
    seen = []
    model.distillation['output'].register_forward_pre_hook(lambda _, args: seen.append(args))
    model.loss(images(), samples(labels_with_unknown()))
    ((student, teacher, labels),) = seen
    assert (student.logits.shape[1], teacher.logits.shape[1]) == (NUM_NEW, NUM_OLD)
    assert student.unknown.shape[1] == 1
    assert set(labels.unique().tolist()) == {0, NUM_OLD, NUM_OLD + 1, 255}


def test_auxiliary_heads_have_an_unknown_class_too() -> None:
    auxiliary = auxiliary_head_cfg(NUM_OLD) | dict(loss_decode=LOSS)
    model = build(ssul_cfg(NUM_OLD, auxiliary_head=auxiliary))
    labels = torch.zeros(2, 64, 64).long()
    labels[:, 32:] = UNKNOWN_LABEL
    losses = model.loss(images(), samples(labels))
    model.parse_losses(losses)[0].backward()
    for head in (model.decode_head, model.auxiliary_head):
        assert head.conv_seg.unknown.weight.grad.abs().max() > 0


def test_an_average_of_the_weights_follows_the_pieces(tmp_path: Path) -> None:
    _, model = next_stage(tmp_path)
    average = ExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(model)
    start = model.state_dict()
    with torch.no_grad():
        model.decode_head.conv_seg.new.bias += 2
    average.update_parameters(model)
    key = f'{CLASSIFIER}.bias'
    moved = average.module.state_dict()[key] - start[key]
    torch.testing.assert_close(moved, torch.tensor([0.0] * NUM_OLD + [1.0] * (NUM_NEW - NUM_OLD)))
