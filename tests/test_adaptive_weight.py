# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Measured weights: against full backward passes and loops, the average by hand, and through a resumed run."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_sats.engine.checks.near_names import with_near_names
from mmseg_sats.engine.config.method_hooks import hooks_of_parts, needs_all_teachers
from mmseg_sats.models import DistillationPart
from mmseg_sats.models.segmentors.weight_rules import Batch, OldRegions, gradient_norm, last_block
from mmseg_sats.visualization.report.losses import draw_weights, weight_series
from mmseg_sats.visualization.report.page import write_report
from mmseg_sats.visualization.report.pictures import Album
from mmseg_sats.visualization.report.run_record import load_runs
from mmseg_sats.visualization.theme import Picture
from tests.small_models import (
    MIT,
    auxiliary_head_cfg,
    build,
    images,
    model_cfg,
    samples,
    save_weights,
)
from tests.tensors import random_labels

OLD, SEEN = 4, 6
LAYER = 'layers.3.1.0'
CRP = dict(type='CRPDistillationLoss')
PARTS = {
    'attention': CRP,
    'features': dict(type='FeatureMSELoss', loss_weight=3.0),
    'pixels': dict(type='UnbiasedDistillationLoss'),
}
WIDE = dict(bounds=(1e-9, 1e9))


def adaptive(part: dict[str, Any] = CRP, **options: Any) -> dict[str, Any]:
    return dict(type='AdaptiveWeight', part=part, every=1) | options


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(build(model_cfg(OLD), seed=8), tmp_path_factory.mktemp('old') / 'snapshot.pth')


def make(snapshot: str, distillation: dict[str, Any], **options: Any) -> nn.Module:
    old = dict(checkpoint=snapshot, num_old=OLD)
    auxiliary = [auxiliary_head_cfg(SEEN, index=3)]
    return build(model_cfg(SEEN, old_model=old, auxiliary_head=auxiliary, distillation=distillation, **options)).train()


def total(losses: dict[str, Tensor], part: str) -> tuple[Tensor, Tensor]:
    """The heads' loss, and the part's."""
    return losses['decode.loss_ce'] + losses['aux_0.loss_ce'], losses[f'loss_{part}']


def full_backward(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return [
        torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for weight in model.backbone.get_submodule(LAYER).parameters()
    ]


def norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


@pytest.mark.parametrize('name', PARTS)
def test_the_ratio_is_that_of_two_full_backward_passes(name: str, snapshot: str) -> None:
    inputs, labels = images().double(), samples(random_labels(2, 64, 64, classes=SEEN))
    plain = make(snapshot, {name: PARTS[name]}).double()
    own, part = total(plain.loss(inputs, labels), name)
    gradients = [full_backward(plain, loss) for loss in (own, part)]
    expected = 0.5 * norm(gradients[0]) / norm(gradients[1])

    model = make(snapshot, {name: adaptive(PARTS[name], ratio=0.5, **WIDE)}).double()
    losses = model.loss(inputs, labels)
    assert all(weight.grad is None for weight in model.parameters())
    assert losses[f'weight_{name}'].item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(losses[f'loss_{name}'], expected * part)
    own_again, weighted = total(losses, name)
    torch.testing.assert_close(own_again, own)
    # What the rule is for, and the gradient of the sum, in which the weight is a constant.
    assert norm(full_backward(model, weighted)) == pytest.approx(0.5 * norm(gradients[0]), rel=1e-9)
    sums = [one + expected * other for one, other in zip(*gradients, strict=True)]
    torch.testing.assert_close(full_backward(model, own_again + weighted), sums)
    torch.testing.assert_close(model.parse_losses(losses)[0], own + expected * part)


def test_the_average_by_hand() -> None:
    part = MODELS.build(adaptive(momentum=0.75, bounds=(2, 50), initial=20))
    some, seen = torch.tensor(3.0), []
    for loss, measured in (
        (some, math.inf), (some, math.nan), (some, 0.0), (0 * some, 5.0),  # nothing to measure
        (some, 8.0), (some, 16.0), (some, math.inf), (0 * some, 40.0), (some, 1e7), (some, 0.1),
    ):
        part.update(loss, torch.tensor(measured))
        seen.append(part.weight.item())
    after = [8, 10, 10, 10, 0.75 * 10 + 0.25 * 50, 0.75 * 20 + 0.25 * 2]
    assert seen == pytest.approx([20, 20, 20, 20, *after])


def test_is_measured_every_third_iteration_and_constant_in_between(snapshot: str) -> None:
    model = make(snapshot, dict(attention=adaptive(every=3, momentum=0.5, **WIDE)))
    weights = []
    for seed in range(7):
        losses = model.loss(images(seed=seed), samples(random_labels(2, 64, 64, classes=SEEN, seed=seed)))
        weights.append(losses['weight_attention'].item())
        sum(value for name, value in losses.items() if 'loss' in name).backward()  # accumulated
    assert weights[:2] == [20, 20]
    assert weights[2] == weights[3] == weights[4] != 20
    assert weights[5] == weights[6] != weights[2]


@pytest.mark.parametrize('expected', [None, 0.25])
def test_old_regions_are_those_of_a_loop(expected: float | None, snapshot: str) -> None:
    labels = random_labels(3, 8, 8, classes=SEEN)
    labels[0][labels[0] == 2], labels[1, :] = 0, 5
    old = new = 0
    for image in labels.tolist():
        for label in {value for row in image for value in row} - {0, 255}:
            old, new = old + (label < OLD), new + (label >= OLD)
    assert (old, new) == (5, 5)
    batch = Batch(torch.zeros(()), nn.Identity(), labels, OLD, SEEN)
    share = 3 / 5 if expected is None else expected
    assert OldRegions(expected)(torch.ones(()), batch).item() == pytest.approx(share * (old + new) / old)
    model = make(snapshot, dict(pixels=adaptive(PARTS['pixels'], rule='old_regions', expected=expected)))
    losses = model.loss(images(3), samples(labels.repeat_interleave(8, 1).repeat_interleave(8, 2)))
    assert losses['weight_pixels'].item() == pytest.approx(20 * share * 2)


def test_without_an_old_class_or_a_difference_nothing_changes(snapshot: str) -> None:
    parts = dict(a=adaptive(), b=adaptive(rule='old_regions'), c=adaptive(PARTS['pixels'], rule='old_regions'))
    model = make(snapshot, parts)
    new = torch.full((2, 64, 64), OLD)
    losses = model.loss(images(), samples(0 * new))
    assert [losses[f'loss_{name}'].item() for name in 'ab'] == [0, 0]
    assert losses['weight_a'] == 20
    losses = model.loss(images(), samples(new))
    assert [losses[f'loss_{name}'].item() > 0 for name in parts] == [True, True, True]
    assert [losses[f'weight_{name}'].item() for name in 'bc'] == [20, 20]
    assert [bool(model.distillation[name].measured) for name in parts] == [True, False, False]
    model = make(snapshot, parts)
    model.backbone.load_state_dict(model.old_model.model.backbone.state_dict())
    losses = model.loss(images(), samples(random_labels(2, 64, 64, classes=SEEN)))
    assert losses['loss_a'] == 0
    assert [losses[f'weight_{name}'].item() for name in 'ab'] == [20, 20]
    with torch.no_grad():  # only training measures
        before = model.distillation.c.iterations
        model.loss(images(), samples(new))
    assert model.distillation.c.iterations == before


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('factor', [1e-9, 100.0])
def test_autocast_loses_no_gradient(factor: float, dtype: torch.dtype, snapshot: str) -> None:
    """Neither a small one nor a large one."""
    torch.manual_seed(0)
    backbone = nn.ModuleDict(dict(layer=nn.Linear(8, 8)))
    inputs = torch.randn(4, 8)
    norms = []
    for enabled in (False, True):
        with torch.autocast('cpu', dtype=dtype, enabled=enabled):
            loss = backbone['layer'](inputs).float().square().sum() * factor
            norms.append(gradient_norm(loss, backbone, 'layer', 'it'))
    assert norms[1].dtype == torch.float32
    torch.testing.assert_close(norms[1], norms[0], rtol=0.02, atol=0)
    model = make(snapshot, dict(attention=adaptive(**WIDE)))
    batch = images(), samples(random_labels(2, 64, 64, classes=SEEN))
    exact = copy.deepcopy(model).loss(*batch)['weight_attention']
    with torch.autocast('cpu', dtype=dtype):
        weight = model.loss(*batch)['weight_attention']
    torch.testing.assert_close(weight, exact, rtol=0.2, atol=0)


class Asking(DistillationPart):
    needs_all_teachers = True
    needs_teacher = False
    reduces_over_ranks = True
    hooks = (dict(type='PrototypeHook'),)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('own', torch.ones(1))

    def prepare(self, *args: Any) -> str:
        return 'prepared'


def test_the_wrapper_has_the_flags_and_hooks_of_its_part() -> None:
    MODELS.register_module(module=Asking, force=True)
    part = MODELS.build(adaptive(dict(type='Asking'), rule='old_regions'))
    assert part.prepare() == 'prepared'
    assert (part.needs_all_teachers, part.needs_teacher, part.reduces_over_ranks) == (True, False, True)
    assert not part.needs_attention
    assert MODELS.build(adaptive()).needs_attention
    assert list(part.state_dict()) == ['part.own']
    copied = copy.deepcopy(part)
    assert copied.part is not part.part
    with pytest.raises(AttributeError, match='nonsense'):
        part.nonsense  # noqa: B018
    model = dict(distillation=dict(a=adaptive(dict(type='Asking')), b=None))
    assert [hook['type'] for hook in hooks_of_parts(model)] == ['AdaptiveWeightHook', 'PrototypeHook']
    assert needs_all_teachers(model)
    assert not needs_all_teachers(dict(distillation=dict(a=adaptive())))


@pytest.mark.parametrize(('options', 'message'), [
    (dict(rule='gradient_nrm'), "'gradient_nrm'.*did you mean 'gradient_norm'"),
    (dict(every=0), 'every=0'),
    (dict(every=2.5), 'every=2.5'),
    (dict(momentum=1), r'momentum=1: expected a number in \[0, 1\)'),
    (dict(bounds=(5, 2)), r'bounds=\(5, 2\)'),
    (dict(bounds=(0, 2)), r'bounds=\(0, 2\)'),
    (dict(initial=0.005), 'initial=0.005: expected a number within bounds'),
    (dict(ratio=0), 'ratio=0'),
    (dict(rule='old_regions', expected=2), 'expected=2'),
    (dict(rule='old_regions', ratio=2.0), 'ratio does nothing with rule='),
    (dict(expected=0.5), 'expected does nothing with rule='),
    (dict(part='CRPDistillationLoss'), 'part=.*expected the config of a part'),
    (dict(part=adaptive()), 'part is an AdaptiveWeight too'),
])  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MODELS.build(adaptive(**options))


def test_a_misspelt_option_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError) as error:
        MODELS.build(adaptive(momentun=0.5))
    assert "did you mean 'momentum'" in with_near_names(error.value)


@pytest.mark.parametrize(('options', 'distillation', 'message'), [
    (dict(frozen=('backbone',)), dict(a=adaptive()), rf'distillation.a: .*backbone.{LAYER}, which has no weight'),
    (dict(with_cp=True), dict(a=adaptive()), r'distillation.a with rule=.*with_cp=False'),
    (dict(), dict(a=adaptive(layer='layers.3.1.7')), rf"a.layer='layers.3.1.7' is no module.*did you mean '{LAYER}'"),
    (dict(), dict(my_loss=adaptive()), 'distillation.my_loss: .*expected a name without "loss"'),
])  # fmt: skip
def test_models_in_which_nothing_can_be_measured(
    options: dict[str, Any], distillation: dict[str, Any], message: str
) -> None:
    cfg = model_cfg(SEEN, distillation=distillation, **{k: v for k, v in options.items() if k == 'frozen'})
    cfg['backbone'] |= {k: v for k, v in options.items() if k == 'with_cp'}
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg)
    # Without gradients the other rule has no such need.
    if options:
        for part in distillation.values():
            part.update(rule='old_regions')
        MODELS.build(cfg)


def test_a_part_that_does_not_reach_the_layer_is_refused_in_the_first_iteration(snapshot: str) -> None:
    model = make(snapshot, dict(a=adaptive(dict(CRP, blocks=(0, 1)), every=9)))
    batch = images(), samples(random_labels(2, 64, 64, classes=SEEN))
    with pytest.raises(ValueError, match=rf'the loss of the part does not depend on backbone.{LAYER}.*layer='):
        model.loss(*batch)
    model = make(snapshot, dict(a=adaptive(dict(CRP, blocks=(0, 1)), layer='layers.1.1.0')))
    assert model.loss(*batch)['weight_a'] != 20


@pytest.mark.parametrize(('cfg', 'expected'), [
    (dict(MIT, type='AttentionMixVisionTransformer', num_layers=[1, 1, 1, 2]), 'layers.3.1.1'),
    (dict(type='ResNet', depth=18, base_channels=4, stem_channels=4), 'layer4.1'),
    (dict(type='AttentionSwinTransformer', embed_dims=4, depths=[1, 1, 1, 2], num_heads=[1] * 4), 'stages.3.blocks.1'),
    (dict(type='AttentionVisionTransformer', img_size=32, embed_dims=4, num_layers=3, num_heads=1), 'layers.2'),
    (dict(type='AttentionSVT', embed_dims=[4] * 4, num_heads=[1] * 4, depths=[2, 2, 2, 4], sr_ratios=[1] * 4,
          mlp_ratios=[4] * 4, windiow_sizes=[7] * 4, norm_after_stage=[True] * 4), 'layers.3.3'),
])  # fmt: skip
def test_the_last_block_of_an_encoder(cfg: dict[str, Any], expected: str) -> None:
    init_default_scope('mmseg')
    assert last_block(MODELS.build(cfg)) == expected
    assert last_block(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())) is None


@HOOKS.register_module()
class SeeWeights(Hook):
    """Writes down the state that each epoch begins with, and can interrupt stage 1."""

    priority = 'LOWEST'
    begun: list[dict[str, Any]] = []
    stop = False

    def before_train_epoch(self, runner: Runner) -> None:
        self.begun.append(runner.model.distillation.attention.running_state())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if self.stop and runner.work_dir.endswith('stage_1') and runner.epoch == 1:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_with_its_weight_and_logs_it(shapes_cfg: Callable[..., Config]) -> None:
    init_default_scope('mmseg')
    SeeWeights.begun.clear()
    cfg = shapes_cfg('sats', batch_size=4, epochs=2, protocol='3-3')
    own = dict(_delete_=True, type='AdaptiveWeight', part=CRP, every=1)
    cfg.merge_from_dict({f'distillation.attention.{key}': value for key, value in own.items()})
    cfg.train_dataloader.num_batch_per_epoch = cfg.test_dataloader.num_batch_per_epoch = 1
    cfg.default_hooks.logger.interval = 1
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='SeeWeights')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeeWeights, 'stop', True)
        with pytest.raises(KeyboardInterrupt):
            RUNNERS.build(cfg).train()
    *_, first, interrupted = SeeWeights.begun
    assert (first['iterations'], first['weight'].item(), first['measured'].item()) == (0, 20, False)
    assert interrupted['iterations'] == 1
    SeeWeights.begun.clear()
    cfg.resume = True
    RUNNERS.build(cfg).train()
    assert SeeWeights.begun == [interrupted]
    stage = Path(cfg.work_dir) / 'stage_1'
    lines = [
        json.loads(line) for path in stage.glob('*/vis_data/scalars.json') for line in path.read_text().splitlines()
    ]
    logged = {line['iter']: line for line in lines if 'loss' in line}
    assert sorted(logged) == [1, 2]
    assert all(line['weight_attention'] > 0 for line in logged.values())
    parts = sum(value for name, value in logged[2].items() if 'loss' in name and name != 'loss')
    assert logged[2]['loss'] == pytest.approx(parts, rel=1e-5)
    state = torch.load(stage / 'snapshot.pth', weights_only=True)['state_dict']
    assert not [key for key in state if key.startswith('distillation')]
    (run,) = load_runs([cfg.work_dir])
    series, _ = weight_series(run.stages)
    assert [value for value in series['attention'][1] if value == value] == [
        logged[step]['weight_attention'] for step in (1, 2)]
    assert [text.get_text() for text in draw_weights(run).legends[0].get_texts()] == ['attention']
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        picture = Picture('any', '<svg/>', '<svg/>', 'any')
        patch.setattr(Album, 'draw', lambda _, name, *__: drawn.append(name) or picture)
        page = write_report([cfg.work_dir], Path(cfg.work_dir) / 'report', images=0, attention=0).read_text()
    assert 'weights_0' in drawn
    assert 'Weights that were measured' in page
